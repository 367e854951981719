"""The LM head at the positions that are asked for and nowhere else, on every device.

Without Triton, TRL's fused head scores every position of every padded row. Here a forward hook takes the hidden states
of the wanted positions out of the backbone's output, so the head never sees the others; its results are put back into
the layout of the rows. The padded and the packed forward both use this.
"""

import copy
from typing import Any

import torch
from torch import Tensor

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # fields of TRL's output

Index = tuple[Tensor, Tensor]  # rows and columns, each `(M,)`


def score_positions(
    model: Any,
    backbone: Any,
    states_at: Index,
    positions: Index,
    targets: list[Tensor],
    *,
    keep_states: bool = False,
    **kwargs: Any,
) -> tuple[Any, list[Tensor]]:
    """Score one or several tokens at each of M positions, by one forward pass.

    Args:
        model: a causal LM with TRL's fused head, possibly wrapped (PEFT, DDP, …).
        backbone: the module of the same model whose output the LM head takes.
        states_at: row and position, in the backbone's output, of the state that predicts each token.
        positions: row and column of each token in the result.
        targets: each `(R, N)`, the tokens to be scored. Those after the first are scored without gradient.
        keep_states: the output gets `states`, `(R, N, H)` from which the tokens were predicted.
        kwargs: what the model's forward gets, without labels.

    Returns:
        TRL's `FusedCausalLMOutput` for the first target, with `(R, N)` fields that are zero where nothing was scored,
        and the `(R, N)` log-probs of each further target.
    """
    n = len(states_at[0])
    kept: list[Tensor] = []

    def take_states(module: Any, args: Any, output: Any) -> Any:
        states = output.last_hidden_state[states_at]  # (M, H)
        if keep_states:
            kept.append(states)
        copies = [states, *[states.detach()] * (len(targets) - 1)]
        output.last_hidden_state = (torch.cat(copies) if len(targets) > 1 else states)[None]  # (1, k·M, H)
        return output

    labels = torch.cat([each[positions] for each in targets])
    handle = backbone.register_forward_hook(take_states)
    try:
        output = model(**kwargs, shift_labels=labels[None], fused_lm_head=True)
    finally:
        handle.remove()

    def in_rows(values: Tensor) -> Tensor:
        return values.new_zeros(*targets[0].shape, *values.shape[1:]).index_put(positions, values)  # (R, N, …)

    first = copy.copy(output)
    for name in PER_TOKEN:
        values = getattr(output, name)
        if values is not None:
            setattr(first, name, in_rows(values[0, :n]))
    if keep_states:
        first.states = in_rows(kept[0])
    others = [in_rows(part.detach()) for part in output.log_probs[0, n:].split(n)] if len(targets) > 1 else []
    return first, others
