"""The parts of a packed row, which tokens attend to which, and attention part by part: the way on CPU.

A part is a prompt or a branch. A token attends to the tokens of its own part that do not follow it and, in a branch,
to the prompt. A layer can limit this by position with a window or chunks; in both cases a token attends to all
positions from a lowest one up to its own. Position 0 is the first token of the prompt.

The scores of each part are one product of matrices over its own keys, which is faster than PyTorch's SDPA for the
lengths of most preference data. A short prompt and its branches are one product together: fewer calls are worth some
scores that the mask removes. The probabilities are kept for the backward pass, so parts with many keys go through
SDPA, which does not keep them.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Above, SDPA is faster (measured for float32), or the probabilities need more memory than the rest of a layer.
MOST_KEYS = {torch.float32: 256}
_MOST_KEYS_IN_HALF = 1024
_MOST_MASKED = 2**15  # scores of a prompt and its branches together that the mask removes


class Segment(NamedTuple):
    """A prompt or a branch: consecutive tokens of a packed row.

    Attributes:
        n_tokens: its number of tokens.
        prompt: index of the part that its tokens attend to as well; None for a prompt, or where there is none.
    """

    n_tokens: int
    prompt: int | None = None


class Reach(NamedTuple):
    """How far back the tokens of a layer attend.

    Attributes:
        window: number of positions, the token's own included; None for all.
        chunk: positions are in chunks of this size, and a token attends within its own; None for no chunks.
    """

    window: int | None = None
    chunk: int | None = None

    def lowest(self, positions: Tensor) -> Tensor:
        """The first position that a token at each of `positions` attends to."""
        lowest = torch.zeros_like(positions)
        if self.window is not None:
            lowest = torch.maximum(lowest, positions - self.window + 1)
        if self.chunk is not None:
            lowest = torch.maximum(lowest, positions - positions % self.chunk)
        return lowest


@dataclass(frozen=True, eq=False)
class Softmax:
    """What the attention of a layer computes.

    Attributes:
        scale: of the scores.
        reach: how far back tokens attend.
        softcap: c of c·tanh(score / c); None for scores without a bound.
        sinks: `(heads,)` score of an additional key without a value, for each head; None for no such key.
    """

    scale: float
    reach: Reach = field(default_factory=Reach)
    softcap: float | None = None
    sinks: Tensor | None = None

    def cap(self, scores: Tensor) -> Tensor:
        """The scores after soft-capping."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


@dataclass
class Segments:
    """The parts of a packed row.

    Attributes:
        parts: in the order of the row, without gaps; a prompt comes before its branches.
        device: where the row is.
        calls: number of calls of the attention.
    """

    parts: list[Segment]
    device: torch.device
    calls: int = 0
    cache: dict[tuple, Any] = field(default_factory=dict)  # masks and indices, the same in each layer

    @property
    def sizes(self) -> list[int]:
        """Tokens of each part."""
        return [part.n_tokens for part in self.parts]

    def n_prompt(self, part: Segment) -> int:
        """Tokens of a part's prompt."""
        return 0 if part.prompt is None else self.parts[part.prompt].n_tokens

    def intervals(self, reach: Reach) -> tuple[Tensor, Tensor, Tensor]:
        """`(N,)` each: token q attends to the tokens first … q, and to second … third − 1."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        rows = [
            (start, self.n_prompt(part), 0 if part.prompt is None else starts[part.prompt])
            for start, part in zip(starts, self.parts, strict=False)
        ]
        table, sizes = (torch.tensor(each, device=self.device) for each in (rows, self.sizes))
        start, n_prompt, prompt = table.repeat_interleave(sizes, dim=0).unbind(1)
        lowest = reach.lowest(torch.arange(starts[-1], device=self.device) - start + n_prompt)
        own = start + (lowest - n_prompt).clamp(min=0)
        return own, prompt + torch.minimum(lowest, n_prompt), prompt + n_prompt

    def groups(self, most: int) -> list[list[int]]:
        """Parts that are computed together: a prompt with its branches where that is cheap, else each by itself.

        Args:
            most: number of keys.
        """
        groups: list[list[int]] = []
        for i, part in enumerate(self.parts):
            if part.prompt is None:
                groups.append([i])
            else:
                groups[-1].append(i)  # branches follow their prompt
        return [each for group in groups for each in self._together(group, most)]

    def _together(self, group: list[int], most: int) -> list[list[int]]:
        parts = [self.parts[i] for i in group]
        n_tokens = sum(part.n_tokens for part in parts)
        needed = sum(part.n_tokens * (part.n_tokens + self.n_prompt(part)) for part in parts)
        cheap = n_tokens <= most and n_tokens**2 - needed <= _MOST_MASKED
        return [group] if cheap else [[i] for i in group]

    def group_bias(self, start: int, n_tokens: int, reach: Reach, rows: int, dtype: torch.dtype) -> Tensor:
        """`(rows · n_tokens, n_tokens)`: as `bias`, for the tokens from `start` on, which attend to no others."""
        name = ("group", start, n_tokens, reach, rows, dtype)
        if name not in self.cache:
            own, low, high = (each[start : start + n_tokens, None] - start for each in self.intervals(reach))
            at = torch.arange(n_tokens, device=self.device)
            seen = ((at >= own) & (at <= at[:, None])) | ((at >= low) & (at < high))
            bias = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
            self.cache[name] = bias.repeat(rows, 1)
        return self.cache[name]

    def dense_mask(self, dtype: torch.dtype) -> Tensor:
        """`(1, 1, N, N)`: 0 where a token attends to a key, and the lowest number elsewhere, as models add it."""
        own, prompt_start, prompt_stop = (each[:, None] for each in self.intervals(Reach()))
        at = torch.arange(len(own), device=self.device)
        seen = ((at >= own) & (at <= at[:, None])) | ((at >= prompt_start) & (at < prompt_stop))
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    def bias(self, n_prompt: int, skipped: int, n_tokens: int, reach: Reach, rows: int, dtype: torch.dtype) -> Tensor:
        """`(rows · n_tokens, keys)`: 0 where a token of a part attends to a key, and −∞ elsewhere.

        Args:
            n_prompt: tokens of its prompt.
            skipped: number of tokens at the start of the prompt that are no keys.
            n_tokens: tokens of the part.
            reach: how far back tokens attend.
            rows: how often the mask is repeated, once for each head that shares a key.
            dtype: of the scores.
        """
        name = (n_prompt, skipped, n_tokens, reach, rows, dtype)
        if name not in self.cache:
            query = torch.arange(n_prompt, n_prompt + n_tokens, device=self.device)[:, None]
            key = torch.arange(skipped, n_prompt + n_tokens, device=self.device)
            seen = (key <= query) & (key >= reach.lowest(query))
            bias = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
            self.cache[name] = bias.repeat(rows, 1)
        return self.cache[name]


def attend_by_parts(segments: Segments, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    """Attention of a packed row, each part by itself.

    Args:
        segments: the parts.
        query: `(1, heads, N, d)`.
        key: `(1, key heads, N, d)`.
        value: `(1, key heads, N, e)`.
        softmax: what is computed.

    Returns:
        `(1, N, heads, e)`.
    """
    most = MOST_KEYS.get(query.dtype, _MOST_KEYS_IN_HALF)
    groups = segments.groups(most)
    sizes = [sum(segments.sizes[i] for i in group) for group in groups]
    # the backward pass of a split is one concatenation; that of a slice would fill a tensor of full size for each
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    shared_heads, starts = query.size(1) // key.size(1), [sum(sizes[:i]) for i in range(len(sizes))]
    number = {group[0]: i for i, group in enumerate(groups)}
    found = []
    for i, group in enumerate(groups):
        q, k, v = queries[i], keys[i], values[i]
        if len(group) > 1:
            bias = segments.group_bias(starts[i], sizes[i], softmax.reach, shared_heads, q.dtype)
            found.append(_by_scores(q, k, v, bias, softmax).transpose(1, 2))
            continue
        part = segments.parts[group[0]]
        n_prompt, skipped = segments.n_prompt(part), 0
        if part.prompt is not None:
            if softmax.reach != Reach():
                skipped = min(int(softmax.reach.lowest(torch.tensor(n_prompt))), n_prompt)
            at = number[part.prompt]
            k, v = (torch.cat((x[at][:, :, skipped:], x[i]), dim=2) for x in (keys, values))
        plain = softmax.softcap is None and softmax.sinks is None
        way, repeats = (_by_sdpa, 1) if plain and k.size(2) > most else (_by_scores, shared_heads)
        bias = segments.bias(n_prompt, skipped, part.n_tokens, softmax.reach, repeats, q.dtype)
        found.append(way(q, k, v, bias, softmax).transpose(1, 2))  # (1, n, heads, e)
    return torch.cat(found, dim=1)


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, softmax: Softmax) -> Tensor:
    causal = len(bias) == bias.size(1) and softmax.reach == Reach()
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if causal else bias,
        is_causal=causal,
        scale=softmax.scale,
        enable_gqa=query.size(1) != key.size(1),
    )


def _by_scores(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, softmax: Softmax) -> Tensor:
    """The heads that share a key are rows of one product, so that keys and values are not copied for each of them."""
    (_, heads, n, d), shared = query.shape, key.size(1)
    q, k = query.reshape(shared, -1, d), key[0].transpose(1, 2)  # (key heads, heads / key heads · n, d)
    if softmax.softcap is None:
        scores = torch.baddbmm(bias.expand(shared, -1, -1), q, k, alpha=softmax.scale)
    else:
        scores = softmax.cap(torch.bmm(q, k) * softmax.scale) + bias
    if softmax.sinks is None:
        probs = scores.softmax(dim=2)
    else:
        sinks = softmax.sinks.to(scores.dtype).view(shared, -1, 1).repeat_interleave(n, dim=1)
        probs = torch.cat((scores, sinks), dim=2).softmax(dim=2)[:, :, :-1]
    return torch.bmm(probs, value[0]).view(1, heads, n, -1)
