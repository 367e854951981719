"""How many tokens a response keeps of a budget over the data set (`token_budget: dataset`; not in the paper)."""

from torch import Tensor


def dataset_budget(lengths: Tensor, token_totals: tuple[int, int], row_keys: Tensor | None) -> Tensor:
    """The tokens that each response keeps, so that chosen and rejected responses keep equally many in total.

    A chosen response keeps the share min(1, ΣT_l / ΣT_w) of its tokens, a rejected one min(1, ΣT_w / ΣT_l), and at
    least one. A share that is no whole number of tokens is rounded up with the probability of its fraction, so that
    the mean over draws is the share itself. In int64, so that the bits are the same on every device.

    Args:
        lengths: `(2B,)` int64, chosen rows first.
        token_totals: ΣT_w and ΣT_l over the data set.
        row_keys: `(2B,)` int64 ≥ 0 from `draw_row_keys`; without them the share is not rounded.

    Returns:
        `(2B,)` ≥ 1: int64, or float64 without `row_keys`.
    """
    total = lengths.new_tensor(token_totals).repeat_interleave(len(lengths) // 2)  # (2B,)
    kept = lengths * min(token_totals)
    if row_keys is None:
        return (kept.double() / total).clamp(min=1)
    return ((kept + row_keys % total) // total).clamp(min=1)
