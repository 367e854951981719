"""Token weights: which completion tokens a method selects, and how much each weighs. Read this file first.

The functions are pure functions of tensors. Every method is one formula, `loss = f(β·(Σ_t w_t r_t(chosen) − Σ_t v_t
r_t(rejected)))`, where r_t is the log-ratio log π(y_t) − log π_ref(y_t) of a completion token; a method is a choice of
the weights w and v. Shapes: a batch of B pairs is 2B rows, chosen first; of L tokens in a row N = L − 1 are predicted,
and `(2B, N)` tensors are aligned with the predicted tokens `input_ids[:, 1:]`. T is the number of completion tokens of
a row, T_w that of a chosen and T_l of a rejected one, T_m = min(T_w, T_l).

Differences from the SamPO paper (arXiv 2406.10957) and its released code:

1. The subset is drawn without replacement. The paper writes `y^t ~ Uniform(T_m, {y}^T)`; its code also draws
   without replacement.
2. Policy and reference share the subset, as in Eq. 10. The released code draws twice; `mask_sharing: independent` in
   the trainer does so too.
3. A subset is a hash of (seed, epoch, tokens of the row, position), not a draw from a generator: it is the same after
   a resume, for any batch size and on any number of processes.
4. `keep_end_token`, `balance_end_token`, `sampled_sides: rejected` and `token_budget: dataset` are not in the paper
   (docs/concepts.md).

To add a method here, write one function and one line in `WEIGHTINGS`; the config, the docs and the tests read that
dict. To add one from outside, call `register_weighting` (docs/plugins.md).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import plugins
from .budget import dataset_budget
from .transport import transport_weights

EVAL_EPOCH = -1  # evaluation draws the same subsets whenever it runs
# Lower bound of 1 − p_end in `balance_end`; without it a reference with p_end near 1 gives an unbounded weight
_MIN_CONTINUE_PROB = 0.01
_INT64_MAX = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class PairTokens:
    """The inputs of a weighting.

    Attributes:
        mask: `(2B, N)` bool, the completion tokens.
        budget: `(2B,)` how many tokens of a row are selected, at least 1: T_m, or T if the response is not
            downsampled, or the row's share of the token budget of the data set. int64; methods that are no `subset`
            get that share unrounded, in float64.
        forced: `(2B, N)` bool, tokens that are always selected (the end tokens with `keep_end_token`); at most one per
            row.
        keys: `(2B, N)` int64 ≥ 0, one random number per token (`draw_keys`).
        log_ratios: `(2B, N)` float, without gradient; only for methods that need them.
        gamma: factor of `decay`.
        tail_weight: of the tokens after `budget` in `ld`.
        given: `(2B, N)` float ≥ 0, weights from the data; only for methods that read them.
        states: `(2B, N, H)` hidden states of the policy that predict the tokens; only for methods that need them.
        transport: coefficients (of the entropy, of the marginals) of `otpo`.
    """

    mask: Tensor
    budget: Tensor
    forced: Tensor
    keys: Tensor | None = None
    log_ratios: Tensor | None = None
    gamma: float = 1.0
    tail_weight: float = 0.0
    given: Tensor | None = None
    states: Tensor | None = None
    transport: tuple[float, float] = (1.0, 0.2)

    @property
    def lengths(self) -> Tensor:
        """`(2B,)` int64, completion tokens of each row."""
        return self.mask.sum(dim=1)


def _all(tokens: PairTokens) -> Tensor:
    """DPO (arXiv 2305.18290): every token weighs 1."""
    return tokens.mask.float()


def _sampo(tokens: PairTokens) -> Tensor:
    """SamPO Eq. 10 (arXiv 2406.10957): 1 on a uniform random subset of `budget` tokens."""
    assert tokens.keys is not None
    return _first(tokens.keys.masked_fill(tokens.forced, -1), tokens).float()


def _expected(tokens: PairTokens) -> Tensor:
    """The mean of `sampo` over all subsets: budget / T, a forced token 1 and the others (budget − 1) / (T − 1)."""
    n_forced = tokens.forced.sum(dim=1)
    share = (tokens.budget - n_forced) / (tokens.lengths - n_forced).clamp(min=1)  # (2B,)
    return torch.where(tokens.forced, 1.0, share[:, None].float()) * tokens.mask


def _mean_rescaled(tokens: PairTokens) -> Tensor:
    """SamPO Eq. 9, "DPO-SANorm": (T_w + T_l) / (2T)."""
    lengths = tokens.lengths.float()
    mean_length = lengths.view(2, -1).mean(dim=0).repeat(2)  # (2B,)
    return (mean_length / lengths.clamp(min=1))[:, None] * tokens.mask


def _mean(tokens: PairTokens) -> Tensor:
    """Length-normalised DPO (SimPO, arXiv 2405.14734, App. I; Tülu 3): 1 / T."""
    return (1 / tokens.lengths.clamp(min=1))[:, None] * tokens.mask


def _prefix(tokens: PairTokens) -> Tensor:
    """POET (arXiv 2506.09457): 1 on the first `budget` tokens."""
    return (tokens.mask & (tokens.mask.cumsum(dim=1) <= tokens.budget[:, None])).float()


def _ld(tokens: PairTokens) -> Tensor:
    """LD-DPO (arXiv 2409.06411): 1 on the first T_m tokens, α on the others."""
    first = _prefix(tokens)
    return first + tokens.tail_weight * (tokens.mask.float() - first)


def _top_k(tokens: PairTokens) -> Tensor:
    """SamPO App. G: 1 on the `budget` tokens with the largest log-ratio."""
    assert tokens.log_ratios is not None
    return _first((-tokens.log_ratios).masked_fill(tokens.forced, -torch.inf), tokens).float()


def _otpo(tokens: PairTokens) -> Tensor:
    """OTPO (arXiv 2505.18720): the marginals of a transport plan between the responses, T_m in total."""
    assert tokens.states is not None
    reg, mass_reg = tokens.transport
    return transport_weights(tokens.states, tokens.mask, reg=reg, mass_reg=mass_reg)


def _column(tokens: PairTokens) -> Tensor:
    """The data's own weights, such as those of TIS-DPO (arXiv 2410.04350)."""
    assert tokens.given is not None
    return tokens.given * tokens.mask


def _decay(tokens: PairTokens) -> Tensor:
    """D2PO (arXiv 2502.14340): γ^t for the completion tokens t = 0, 1 and so on."""
    position = (tokens.mask.cumsum(dim=1) - 1).clamp(min=0)
    return tokens.gamma**position * tokens.mask


def _first(order_by: Tensor, tokens: PairTokens) -> Tensor:
    """`(2B, N)` bool: in each row the `budget` completion tokens with the smallest value, the earlier of equals."""
    last = torch.inf if order_by.is_floating_point() else _INT64_MAX
    order = order_by.masked_fill(~tokens.mask, last).argsort(dim=1, stable=True)  # (2B, N)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.size(1), device=order.device).expand_as(order)
    )
    return tokens.mask & (rank < tokens.budget[:, None])


@dataclass(frozen=True)
class Weighting:
    """One method.

    Attributes:
        weights: `PairTokens` -> `(2B, N)` float32 weights ≥ 0, zero outside the completion.
        title: name in tables and on the model card.
        formula: weight of a completion token, for the docs.
        source: arXiv id and equation, or how it was derived.
        subset: the weights are 0 or 1, so that token counts and likelihood ratios are defined.
        downsamples: the weights select `budget` tokens of a response, so `sampled_sides` and `token_budget` are
            defined.
        random: the weights depend on `keys`.
        can_keep_end: `keep_end_token` is defined.
        needs_log_ratios: the weights depend on `log_ratios`.
        needs_states: the weights depend on `states`.
        from_data: the weights depend on `given`.
    """

    weights: Callable[[PairTokens], Tensor]
    title: str
    formula: str
    source: str
    subset: bool = False
    downsamples: bool = False
    random: bool = False
    can_keep_end: bool = False
    needs_log_ratios: bool = False
    needs_states: bool = False
    from_data: bool = False

    @property
    def needs_policy(self) -> bool:
        """The weights are known only after a forward pass of the policy."""
        return self.needs_log_ratios or self.needs_states


WEIGHTINGS: dict[str, Weighting] = {
    "all": Weighting(_all, "DPO", "1", "arXiv 2305.18290", subset=True),
    "sampo": Weighting(
        _sampo,
        "SamPO",
        "1 on a uniform random subset of T_m tokens",
        "arXiv 2406.10957, Eq. 10",
        subset=True,
        downsamples=True,
        random=True,
        can_keep_end=True,
    ),
    "expected": Weighting(
        _expected,
        "SamPO in expectation",
        "T_m / T",
        "derived from arXiv 2406.10957, Eq. 10",
        downsamples=True,
        can_keep_end=True,
    ),
    "mean_rescaled": Weighting(_mean_rescaled, "DPO-SANorm", "(T_w + T_l) / (2T)", "arXiv 2406.10957, Eq. 9"),
    "mean": Weighting(_mean, "length-normalised DPO", "1 / T", "arXiv 2405.14734, App. I"),
    "prefix": Weighting(
        _prefix, "POET", "1 on the first T_m tokens", "arXiv 2506.09457", subset=True, downsamples=True
    ),
    "ld": Weighting(_ld, "LD-DPO", "1 on the first T_m tokens, α on the others", "arXiv 2409.06411"),
    "top_k": Weighting(
        _top_k,
        "SamPO-TopK",
        "1 on the T_m tokens with the largest log-ratio",
        "arXiv 2406.10957, App. G",
        subset=True,
        downsamples=True,
        can_keep_end=True,
        needs_log_ratios=True,
    ),
    "decay": Weighting(_decay, "D2PO", "γ^t, t = 0, 1, …", "arXiv 2502.14340"),
    "otpo": Weighting(
        _otpo,
        "OTPO",
        "the marginal of an optimal transport plan between the hidden states of both responses, T_m in total",
        "arXiv 2505.18720",
        needs_states=True,
    ),
    "column": Weighting(
        _column,
        "weights from the data",
        "that of the columns `chosen_weights`, `rejected_weights`",
        "the data; such as TIS-DPO's, arXiv 2410.04350",
        from_data=True,
    ),
}

REGISTERED: dict[str, str] = {}  # methods from outside: name -> hash of the file that they are written in


def register_weighting(name: str, weighting: Weighting) -> None:
    """Add a method from outside to `WEIGHTINGS`; `token_weighting: name` then trains with it.

    Args:
        name: new, of letters, digits and underscores.
        weighting: the method.

    Raises:
        ValueError: the name is taken or is no name, or `weighting` is no `Weighting`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the name of a weighting must be of letters, digits and underscores, got {name!r}.")
    if name in WEIGHTINGS:
        raise ValueError(f"the name of a weighting must be new, got {name!r}, which is taken. Choose another one.")
    if not isinstance(weighting, Weighting) or not callable(weighting.weights):
        raise ValueError(f"the weighting {name!r} must be a `sampo.Weighting` with a function, got {weighting!r}.")
    file = Path(getattr(getattr(weighting.weights, "__code__", None), "co_filename", ""))
    WEIGHTINGS[name] = weighting
    REGISTERED[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def token_weights(
    name: str,
    mask: Tensor,
    *,
    end: Tensor | None = None,
    keys: Tensor | None = None,
    row_keys: Tensor | None = None,
    log_ratios: Tensor | None = None,
    sampled_sides: str = "both",
    token_totals: tuple[int, int] | None = None,
    keep_end_token: bool = False,
    gamma: float = 1.0,
    tail_weight: float = 0.0,
    given: Tensor | None = None,
    states: Tensor | None = None,
    transport: tuple[float, float] = (1.0, 0.2),
) -> Tensor:
    """The weights of a method for a batch of pairs.

    Args:
        name: a key of `WEIGHTINGS`.
        mask: `(2B, N)` bool, completion tokens, chosen rows first.
        end: `(2B, N)` bool, the end token of each completion (`last_end_tokens`); needed with `keep_end_token`.
        keys: `(2B, N)` int64 from `draw_keys`; needed by `sampo`.
        row_keys: `(2B,)` int64 from `draw_row_keys`; needed by subset methods with `token_totals`.
        log_ratios: `(2B, N)` float; needed by `top_k`. The selection passes no gradient.
        sampled_sides: `both`, or `rejected`: all tokens of chosen rows are selected.
        token_totals: ΣT_w and ΣT_l of the data set with `token_budget: dataset`, None with `pair`.
        keep_end_token: the end token is always selected.
        gamma: factor of `decay`.
        tail_weight: α of `ld`.
        given: `(2B, N)` float; needed by `column`.
        states: `(2B, N, H)` float; needed by `otpo`.
        transport: coefficients of `otpo`.

    Returns:
        `(2B, N)` float32, ≥ 0, zero where `mask` is.
    """
    method, lengths = WEIGHTINGS[name], mask.sum(dim=1)
    if token_totals is None:
        budget = lengths.view(2, -1).amin(dim=0).repeat(2)  # (2B,): T_m in both rows of a pair
    else:
        assert row_keys is not None or not method.subset
        budget = dataset_budget(lengths, token_totals, row_keys if method.subset else None)
    if sampled_sides == "rejected":
        n_pairs = mask.size(0) // 2
        budget = torch.cat((lengths[:n_pairs].to(budget.dtype), budget[n_pairs:]))
    forced = torch.zeros_like(mask) if end is None or not keep_end_token else end
    more = log_ratios, gamma, tail_weight, given, states, transport
    weights = method.weights(PairTokens(mask, budget, forced, keys, *more))
    if weights.shape != mask.shape:
        raise ValueError(
            f"the weights of `{name}` must have the shape of `mask`, {tuple(mask.shape)}, got {tuple(weights.shape)}."
        )
    return weights


def sequence_logps(logps: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t·log π(y_t), `(2B,)`; of the policy's minus of the reference's is the score S, β·S the implicit reward.

    Args:
        logps: `(2B, N)` nats.
        weights: `(2B, N)`.
    """
    return (weights * logps).sum(dim=1)


def length_pressure(weights: Tensor, end: Tensor, end_probs: Tensor) -> Tensor:
    """d(S_w − S_l)/db for a shift b of the end token's logit at every position; below 0, training lengthens.

    A completion contributes Σ_t w_t·(1[y_t = end] − p_end(t)): the derivative of log-softmax is 1[y_t = end] − p_end.

    Args:
        weights: `(2B, N)`.
        end: `(2B, N)` bool, where the predicted token is the end token.
        end_probs: `(2B, N)`, the policy's probability of the end token; any number where the weight is 0.

    Returns:
        `(B,)`.
    """
    chosen, rejected = (weights * (end.float() - end_probs)).sum(dim=1).chunk(2)
    return chosen - rejected


def balance_end(weights: Tensor, end: Tensor, end_probs: Tensor) -> Tensor:
    """The weights, with end tokens reweighted so that the length pressure of each response is 0 under `end_probs`.

    Σ_t w_t·(1[y_t = end] − p_end(t)) = 0 if the end token weighs Σ_{other t} w_t·p_end(t) / (1 − p_end(T)). A response
    without an end token keeps its weights.

    Args:
        weights: `(2B, N)`, 0 outside the completion; the value at the end token is not used.
        end: `(2B, N)` bool, the end token of each completion (`last_end_tokens`).
        end_probs: `(2B, N)`, the reference's probability of the end token; any number where the weight is 0 and no
            response ends.

    Returns:
        `(2B, N)`, ≥ 0.
    """
    others = (weights * end_probs).masked_fill(end, 0.0).sum(dim=1, keepdim=True)
    return torch.where(end, others / (1 - end_probs).clamp(min=_MIN_CONTINUE_PROB), weights)


def last_end_tokens(input_ids: Tensor, mask: Tensor, end_token_ids: Tensor) -> Tensor:
    """`(2B, N)` bool: the last token of each completion that is an end token.

    This is not always its last token: ChatML templates put a newline after `<|im_end|>`. A completion that was
    truncated before its end token has none, and its row is all False.

    Args:
        input_ids: `(2B, L)`.
        mask: `(2B, N)` bool, N = L − 1.
        end_token_ids: `(E,)` ids of EOS and end-of-turn tokens.
    """
    is_end = mask & torch.isin(input_ids[:, 1:], end_token_ids)
    after = is_end.flip(1).cumsum(dim=1).flip(1)  # end tokens from here to the end of the row
    return is_end & (after == 1)


# --- subsets without a generator: splitmix64 (Steele, Lea & Flood 2014) in int64 with wrap-around -------------------
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift: int64 in torch has only the arithmetic one."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """splitmix64 of each element; `splitmix64(0) = 0xE220A8397B1DCDAF` as published."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def fingerprints(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`(R,)` int64, one hash per row of its real tokens in their order; padding on either side does not change it."""
    real = attention_mask.long()
    position = real.cumsum(dim=1) - 1
    tokens = splitmix64(splitmix64(input_ids) + position * _GOLDEN) * real  # (R, L)
    return splitmix64(tokens.sum(dim=1) ^ real.sum(dim=1))


def draw_keys(input_ids: Tensor, attention_mask: Tensor, *, seed: int, epoch: int, stream: int = 0) -> Tensor:
    """One random number per predicted token; the T_m smallest of a row are a uniform subset.

    Args:
        input_ids: `(2B, L)` int64.
        attention_mask: `(2B, L)`, 1 for real tokens.
        seed: of the run.
        epoch: 0, 1, … in training, −1 in evaluation.
        stream: distinguishes the draws of one epoch: those of `mask_samples`, and the reference's own.

    Returns:
        `(2B, L − 1)` int64, ≥ 0: a function of (seed, epoch, stream, tokens of the row, position) and nothing else.
    """
    row = _row_states(input_ids, attention_mask, (seed, epoch, stream))
    position = attention_mask.long().cumsum(dim=1) - 1
    return _shift_right(splitmix64(row[:, None] + position * _GOLDEN), 1)[:, 1:]


def draw_row_keys(input_ids: Tensor, attention_mask: Tensor, *, seed: int, epoch: int, stream: int = 0) -> Tensor:
    """One random number per row, `(2B,)` int64 ≥ 0, independent of `draw_keys` with the same arguments."""
    row = _row_states(input_ids, attention_mask, (seed, epoch, stream))
    return _shift_right(splitmix64(row - _GOLDEN), 1)  # the position before the first token's


def _row_states(input_ids: Tensor, attention_mask: Tensor, parts: tuple[int, ...]) -> Tensor:
    """`(2B,)` a hash of the row's tokens and of `parts`."""
    run = torch.zeros((), dtype=torch.int64, device=input_ids.device)
    for part in parts:
        run = splitmix64(run ^ part)
    return splitmix64(fingerprints(input_ids, attention_mask) ^ run)


plugins.load_plugins()  # last, so that they find everything above
