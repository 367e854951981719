"""Packing: a batch of pairs as one row without padding, with each prompt computed once (the *pair stream*).

The batch is laid out as one row of N tokens: for each pair `prompt[:-1] | last prompt token + chosen[:-1] | last
prompt token + rejected[:-1]`. Each branch starts with its own copy of the last prompt token, so every completion token
is predicted inside its branch. Position ids restart with each branch; a branch attends to its prompt and,
causally, to itself, never to the other branch or to another pair. Linear layers and norms cost N tokens; the LM head
sees only the tokens that are to be scored, on every device. Prefix sharing for preference pairs: arXiv 2410.20305.

transformers lets a library register an attention function, so no model code is changed: see `interface`.

Example, with a prompt of the tokens 1 2 3:

    chosen  1 2 3 4 5     stream     1 2 | 3 4 | 3
    rejected 1 2 3 6      position   0 1 | 2 3 | 2
                          predicts   . . | 4 5 | 6
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import StreamRefused
from .interface import is_installed, marks_for_masks, takes_marks
from .lm_head import score_positions
from .segments import Segment, Segments

# types of layers, in a config of transformers, that a packed row would change, and why
_MIXERS = {
    **dict.fromkeys(
        ("linear_attention", "conv", "hybrid", "hybrid_sliding"), "carry a state from one response into the next"
    ),
    **dict.fromkeys(
        ("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"),
        "select or compress the keys of a row",
    ),
}
# families whose code does something that a packed row would change, and that their config does not say
_FAMILIES = {
    "cpmant": "the model puts tokens of its own in front of each row",
    "doge": "the model's mask depends on the values",
    "openai-gpt": "the model makes its mask of the padding alone",
}
_MOST_DENSE = 4096  # tokens of a packed row for a model that needs an N × N mask


class RowsTooLong(StreamRefused):
    """The model computes long rows differently, and this batch has one."""


@dataclass
class Stream:
    """A batch of pairs as one row.

    Attributes:
        input_ids: `(1, N)`.
        position_ids: `(1, N)`.
        segments: which tokens attend to which.
        positions: `(M,)` stream index of each of the M branch tokens.
        rows: `(M,)` its row in the `(2B, L − 1)` layout of TRL.
        columns: `(M,)` its column there.
        row_length: L, tokens of the longest row before it was laid out.
        n_rows: `(1, N)` float, number of rows that each token stands for: 2 for a prompt that both of a pair share.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    positions: Tensor
    rows: Tensor
    columns: Tensor
    row_length: int
    n_rows: Tensor


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    needed: Tensor | None = None,
    *,
    every_token: bool = False,
) -> Stream:
    """Lay a collated batch out as one row.

    Args:
        input_ids: `(2B, L)`, chosen rows first, padded on the right.
        attention_mask: `(2B, L)`.
        completion_mask: `(2B, L)`.
        needed: `(2B, L − 1)` bool, the completion tokens that may be scored; None for all. Tokens after the last one
            of a row are omitted, which is exact because attention is causal; a row without any gets no branch.
        every_token: omit none of them, not even the last token of a row, which predicts nothing: the auxiliary loss of
            a mixture of experts is a mean over all.

    Rows of a pair that do not begin with the same prompt (possible with `truncation_mode: keep_end`) share nothing:
    each gets its own prompt.
    """
    ids = input_ids.tolist()
    n_prompt = (attention_mask.sum(dim=1) - completion_mask.sum(dim=1)).tolist()
    in_completion = completion_mask[:, 1:].bool()
    stops = attention_mask.sum(dim=1).tolist() if every_token else _stops(in_completion if needed is None else needed)
    if not any(stops):
        n_prompt[0] = stops[0] = 1  # a model needs at least one token
    tokens: list[int] = []
    position_ids: list[int] = []
    parts: list[Segment] = []
    positions: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    n_rows: list[int] = []
    for group in _groups(ids, n_prompt, stops):
        shared = max(n_prompt[group[0]] - 1, 0)  # the last prompt token belongs to the branches
        tokens += ids[group[0]][:shared]
        position_ids += range(shared)
        n_rows += [len(group)] * shared
        prompt = len(parts) if shared else None
        if shared:
            parts.append(Segment(shared))
        for row in group:
            branch_start = len(tokens)
            tokens += ids[row][shared : stops[row]]
            position_ids += range(shared, stops[row])
            n_rows += [1] * (stops[row] - shared)
            predicting = min(stops[row], input_ids.size(1) - 1)  # the last token of the longest row has no column
            positions += range(branch_start, branch_start + predicting - shared)
            rows += [row] * (predicting - shared)
            columns += range(shared, predicting)
            parts.append(Segment(len(tokens) - branch_start, prompt))

    def tensor(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=input_ids.device)

    return Stream(
        input_ids=tensor([tokens]),
        position_ids=tensor([position_ids]),
        segments=Segments(parts, input_ids.device),
        positions=tensor(positions),
        rows=tensor(rows),
        columns=tensor(columns),
        row_length=input_ids.size(1),
        n_rows=tensor([n_rows]).float(),
    )


def _stops(needed: Tensor) -> list[int]:
    """The number of tokens of each row that the needed ones depend on; 0 where none is needed."""
    counts = torch.arange(1, needed.size(1) + 1, device=needed.device)  # column c is predicted by the tokens 0 … c
    return (needed * counts).amax(dim=1).tolist() if needed.size(1) else [0] * len(needed)


def _groups(ids: list[list[int]], n_prompt: list[int], stops: list[int]) -> Iterator[list[int]]:
    """Rows that share a prompt, chosen first: one or two of a pair."""
    n_pairs = len(ids) // 2
    for chosen in range(n_pairs):
        rows = [row for row in (chosen, chosen + n_pairs) if stops[row]]
        prompts = [ids[row][: n_prompt[row]] for row in rows]
        if len(rows) == 2 and prompts[0] != prompts[1]:
            yield from ([row] for row in rows)
        elif rows:
            yield rows


def score_packed(
    model: Any,
    backbone: Any,
    stream: Stream,
    positions: Tensor,
    targets: list[Tensor],
    *,
    output_router_logits: bool = False,
    keep_states: bool = False,
) -> tuple[Any, list[Tensor]]:
    """Score one or several tokens at each position, in the layout that the padded forward has.

    Args:
        model: a causal LM with TRL's fused head, possibly wrapped (PEFT, DDP, …).
        backbone: the module of the same model whose output the LM head takes.
        stream: the batch.
        positions: `(2B, L − 1)` bool, the tokens that go through the LM head; they must be in the stream.
        targets: each `(2B, L − 1)`, the tokens to be scored there. Those after the first are scored without gradient.
        output_router_logits: compute the auxiliary loss of a mixture of experts; the stream must have every token.
        keep_states: as in `score_positions`.

    Returns:
        TRL's `FusedCausalLMOutput` for the first target, with `(2B, L − 1)` fields that are zero where `positions` is
        not, and the `(2B, L − 1)` log-probs of each further target.

    Raises:
        StreamRefused: the model did something with the attention that the stream does not do, or (`RowsTooLong`) does
            so with rows of this length.
    """
    reason = too_long(backbone.config, stream)
    if reason:
        raise RowsTooLong(reason)
    kept = positions[stream.rows, stream.columns]
    missing = (positions.sum() - kept.sum()).item()
    assert not missing, f"{missing} of the tokens to be scored are not in the stream: `needed` must hold for them all"
    at, rows, columns = stream.positions[kept], stream.rows[kept], stream.columns[kept]
    stream.segments.calls = 0
    router = {}
    if hasattr(backbone.config.get_text_config(), "output_router_logits"):
        router["output_router_logits"] = output_router_logits
    marked = takes_marks(backbone)
    if not marked:
        mask = stream.segments.dense_mask(backbone.dtype)
    elif output_router_logits:
        mask = stream.n_rows  # the auxiliary loss multiplies by it; all else asks only whether it is 0
    else:
        mask = torch.ones_like(stream.input_ids)
    with marks_for_masks(stream.segments):
        output = score_positions(
            model,
            backbone,
            (torch.zeros_like(at), at),
            (rows, columns),
            targets,
            input_ids=stream.input_ids,
            position_ids=stream.position_ids,
            attention_mask=mask,
            use_cache=False,
            keep_states=keep_states,
            **router,
        )
    layers, calls = backbone.config.get_text_config().num_hidden_layers, stream.segments.calls
    scored = output[0].log_probs
    if scored.requires_grad:  # gradient checkpointing computes the attention again in the backward pass
        scored.register_hook(lambda _, needed=stream.segments: None)  # kept as long as the graph
    if marked and (not calls or calls % layers):  # some families call it twice in each layer
        raise StreamRefused(
            f"{calls} of the model's {layers} layers called the attention function that was registered"
        )
    return output


def too_long(config: Any, stream: Stream) -> str | None:
    """Why a batch is too long for packing with a model of this config; None if it is not.

    Some models change the rotary frequencies of all rows when one of them, padding included, is longer than a limit.
    """
    text = config.get_text_config()
    n_tokens = stream.input_ids.numel()
    if not is_installed(text) and n_tokens > _MOST_DENSE:
        return f"the model takes a dense mask (of at most {_MOST_DENSE:,} tokens), and a batch has {n_tokens:,}"
    rope = getattr(text, "rope_parameters", None) or {}
    by_type = [value for value in rope.values() if isinstance(value, dict)]  # some have them for each type of layer
    for each in [rope, *by_type]:
        limits = {
            "longrope": each.get("original_max_position_embeddings"),
            "dynamic": getattr(text, "max_position_embeddings", None),
        }
        limit = limits.get(each.get("rope_type", ""))
        if limit is not None and stream.row_length > limit:
            return f"the model's rotary frequencies change beyond {limit} tokens, and a row has {stream.row_length}"
    return None


def why_not(model: Any) -> str | None:
    """Why a model cannot take packed rows, as far as is known without running it; None if there is no reason."""
    peft = getattr(model, "active_peft_config", None)
    text = model.config.get_text_config()
    if peft is not None and peft.is_prompt_learning:
        return "prompt learning puts virtual tokens in front of each row"
    if text is not model.config:
        return "the model takes more than text, whose positions are not those of a row"
    for kind in getattr(text, "layer_types", None) or ():
        if kind in _MIXERS:
            return f"the model's layers of type `{kind}` {_MIXERS[kind]}"
    if model._is_stateful:
        return "the model is recurrent, and its state would go from one response into the next"
    if text.model_type in _FAMILIES:
        return _FAMILIES[text.model_type]
    if not takes_marks(model):
        return _why_no_dense_mask(model if peft is None else model.get_base_model())
    return None


def _why_no_dense_mask(model: Any) -> str | None:
    """The same for a model whose attention cannot be replaced, and which gets the mask of the packed row instead."""
    text = model.config
    if getattr(text, "alibi", False) or any("alibi" in name for name in dir(type(model.base_model))):
        return "the model's ALiBi counts positions along the packed row"
    if "local" in getattr(text, "attention_layers", ()):
        return "the model's local layers count positions along the packed row"
    if text._attn_implementation not in ("eager", "sdpa"):
        return f"the model's own code for `{text._attn_implementation}` takes no mask"
    return None
