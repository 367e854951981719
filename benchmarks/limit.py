"""The limit of a step: the bare backbone and the LM head over the tokens that a step cannot do without."""

import torch
from torch import Tensor


def limit_loss(policy, reference, *, unique: int, selected: int, n_rows: int) -> Tensor:
    """A loss whose forward and backward pass do the work of a step and nothing more.

    Args:
        policy: with gradients.
        reference: runs forward only; None where its log-probs are cached.
        unique: tokens of the batch when each prompt counts once. They are computed in rows of equal length.
        selected: number of tokens that go through the LM head.
        n_rows: number of these rows.
    """
    ids = torch.randint(policy.config.vocab_size, (n_rows, unique // n_rows), device=policy.device)
    targets = ids.flatten()[:selected, None]

    def sum_of(model) -> Tensor:
        states = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[:selected]
        logps = model.get_output_embeddings()(states).float().log_softmax(dim=-1)  # (M, V)
        return logps.gather(1, targets).sum()

    if reference is not None:
        with torch.no_grad():
            sum_of(reference)
    return sum_of(policy)
