"""The LM head only where it counts, on every device.

Where there is no Triton, TRL's fused head scores every position of every padded row. Here a forward hook picks the
wanted positions out of the backbone's output, so the head never sees the others; its results are put back into the
layout of the rows. Both the plain forward and the pair stream go through this.
"""

import copy

from torch import Tensor

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def score_places(model, backbone, at: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor], targets: Tensor, **kwargs):
    """Score one token at each of M places.

    Args:
        model: a causal LM with TRL's fused head, maybe wrapped (PEFT, DDP, …).
        backbone: the module of the same model whose output the LM head takes.
        at: `(M,)` and `(M,)`, row and position in the backbone's output of the state that predicts each token.
        places: `(M,)` and `(M,)`, row and column of each token in the result.
        targets: `(2B, N)`, the token to be scored at each place.
        kwargs: what the model's forward gets, without labels.

    Returns:
        TRL's `FusedCausalLMOutput` with `(2B, N)` fields, zero where nothing was scored.
    """

    def pick(module, args, output):
        output.last_hidden_state = output.last_hidden_state[at][None]  # (1, M, H)
        return output

    handle = backbone.register_forward_hook(pick)
    try:
        output = model(**kwargs, shift_labels=targets[places][None], fused_lm_head=True)
    finally:
        handle.remove()
    result = copy.copy(output)
    for name in _PER_TOKEN:
        values = getattr(output, name)
        if values is not None:
            setattr(result, name, values.new_zeros(targets.shape).index_put(places, values[0]))
    return result
