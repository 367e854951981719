"""Attention of a packed row: each way against the definition, with windows, chunks, soft-capping and sinks."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from varlen_reference import own_flash, sequence_by_sequence

from sampo.scoring import attention, segments
from sampo.scoring.attention import attend
from sampo.scoring.flex import attend_by_flex, make_block_mask, sees
from sampo.scoring.segments import Part, Reach, Segments, Softmax, attend_by_parts
from sampo.scoring.varlen import attend_by_own, attend_by_torch

# FlexAttention wants to be compiled, which takes half a minute here
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

lengths = st.integers(0, 90)
pairs = st.tuples(lengths, st.lists(st.integers(1, 100), min_size=1, max_size=2))
batches = st.lists(pairs, min_size=1, max_size=2)
reaches = st.builds(Reach, st.none() | st.integers(1, 150), st.none() | st.integers(1, 150))
softmaxes = st.builds(
    Softmax,
    scale=st.sampled_from([0.35, 0.7]),
    reach=reaches,
    softcap=st.none() | st.just(1.5),
    sinks=st.none() | st.just(torch.tensor([0.0, -1.0, 1.0, 2.0])),
)
PLAIN = Softmax(scale=0.35)


def segments_of(batch):
    """Of pairs (tokens of the shared prompt, tokens of each branch)."""
    parts = []
    for n_prompt, branches in batch:
        prompt = len(parts) if n_prompt else None
        parts += [Part(n_prompt)] * (n_prompt > 0) + [Part(n_branch, prompt) for n_branch in branches]
    return Segments(parts, torch.device("cpu"))


def seen_by_definition(batch, reach=Reach()):  # noqa: B008 - immutable
    """A token sees its prompt and, causally, its own branch; a prompt token sees the prompt causally.

    Of these, it sees those at most a window back, and in its own chunk, where a branch continues its prompt.
    """
    owners = []  # of each token: pair, branch or None, and position
    for pair, (n_prompt, branches) in enumerate(batch):
        owners += [(pair, None, position) for position in range(n_prompt)]
        for branch, n_branch in enumerate(branches):
            owners += [(pair, branch, n_prompt + i) for i in range(n_branch)]
    seen = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for query, (pair, branch, position) in enumerate(owners):
        for key, (other_pair, other_branch, other) in enumerate(owners[: query + 1]):
            same_row = pair == other_pair and other_branch in (None, branch)
            in_window = reach.window is None or position - other < reach.window
            in_chunk = reach.chunk is None or position // reach.chunk == other // reach.chunk
            seen[query, key] = same_row and in_window and in_chunk
    return seen


def by_definition(batch, query, key, value, softmax):
    """`(1, N, heads, d)` by a dense mask over all of the row."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * softmax.scale
    if softmax.softcap:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    weights = scores.exp() * seen_by_definition(batch, softmax.reach)
    sinks = 0.0 if softmax.sinks is None else softmax.sinks.exp()[:, None, None]
    return (weights / (weights.sum(dim=3, keepdim=True) + sinks) @ value).transpose(1, 2)


def random_heads(n, *, heads=4, key_heads=2, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, n, 8), (1, key_heads, n, 8), (1, key_heads, n, 6)]
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def check(ours, theirs, heads):
    """Output and gradients."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    for mine, reference in zip(
        *(torch.autograd.grad((x * weights).sum(), heads) for x in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)


@given(batch=batches, reach=reaches)
@settings(max_examples=20, deadline=None)
def test_the_intervals_are_those_of_the_definition(batch, reach):
    found = segments_of(batch)
    dense = seen_by_definition(batch, reach)
    index = torch.arange(len(dense))
    assert torch.equal(sees(*found.intervals(reach))(0, 0, index[:, None], index), dense)


@given(batch=batches)
@settings(max_examples=10, deadline=None)
def test_the_dense_mask_is_that_of_the_definition(batch):
    mask = segments_of(batch).dense_mask(torch.float32)[0, 0]
    assert torch.equal(mask == 0, seen_by_definition(batch))
    assert mask.isfinite().all()


@given(batch=batches, reach=reaches)
@example(batch=[(60, [250, 20])], reach=Reach())  # a full block across the end of the prompt
@settings(max_examples=20, deadline=None)
def test_the_block_mask_is_the_one_that_torch_makes_of_the_dense_mask(batch, reach):
    dense = seen_by_definition(batch, reach)
    n = len(dense)
    theirs = create_block_mask(lambda b, h, q, kv: dense[q, kv], None, None, n, n, device="cpu")
    ours = make_block_mask(segments_of(batch), reach)
    assert ours.shape == theirs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(numbers, getattr(theirs, f"{kind}_num_blocks")), kind
        indices, expected = getattr(ours, f"{kind}_indices"), getattr(theirs, f"{kind}_indices")
        counted = torch.arange(indices.size(-1)) < numbers[..., None]  # what comes behind is not looked at
        assert torch.equal(indices[counted], expected[counted]), kind


@pytest.mark.parametrize("most_keys", [0, 256])  # by SDPA where that can be, and by products of matrices
@given(batch=batches, softmax=softmaxes, key_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_by_parts_output_and_gradients_are_those_of_the_definition(most_keys, batch, softmax, key_heads):
    row = segments_of(batch)
    heads = random_heads(sum(row.sizes), key_heads=key_heads, grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segments._MOST_KEYS, torch.float32, most_keys)
        check(attend(row, *heads, softmax), by_definition(batch, *heads, softmax), heads)


def test_the_sinks_get_their_gradient():
    batch, sinks = [(5, [4, 3])], torch.tensor([0.0, -1.0, 1.0, 2.0], requires_grad=True)
    heads, softmax = random_heads(12), Softmax(scale=0.35, sinks=sinks)
    check(attend(segments_of(batch), *heads, softmax), by_definition(batch, *heads, softmax), [sinks])


@given(batch=batches, softmax=softmaxes, key_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_flex_attention_gives_what_the_parts_give(batch, softmax, key_heads):
    """Forward only: FlexAttention has no backward pass on CPU, compiled or not."""
    row = segments_of(batch)
    heads = random_heads(sum(row.sizes), key_heads=key_heads)
    torch.testing.assert_close(
        attend_by_flex(row, *heads, softmax), attend_by_parts(row, *heads, softmax), atol=1e-5, rtol=0
    )


def torchs_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    assert enable_gqa == (query.size(1) != key.size(1))
    assert window_size[1] == 0
    window = None if window_size[0] == -1 else window_size[0] + 1  # the window's left side is without the query
    return sequence_by_sequence(query, key, value, cu_seq_q, cu_seq_k, scale=scale, window=window)


windows = st.builds(Reach, st.none() | st.integers(1, 150), st.none())


@given(batch=batches, reach=windows, key_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_varlen_kernels_get_each_part_with_the_keys_of_its_prompt(batch, reach, key_heads):
    row, softmax = segments_of(batch), Softmax(scale=0.7, reach=reach)
    heads = random_heads(sum(row.sizes), key_heads=key_heads, grad=True)
    check(attend_by_torch(row, *heads, softmax, torchs_varlen), by_definition(batch, *heads, softmax), heads)


@given(batch=batches, softmax=softmaxes)
@settings(max_examples=15, deadline=None)
def test_a_models_own_flash_attention_gets_the_same_sequences(batch, softmax):
    row = segments_of(batch)
    heads = random_heads(sum(row.sizes), grad=True)
    softmax = Softmax(softmax.scale, Reach(softmax.reach.window), softmax.softcap, softmax.sinks)

    def own(*args, **kwargs):
        return own_flash(softmax, *args, **kwargs)

    check(attend_by_own(row, *heads, own), by_definition(batch, *heads, softmax), heads)


# --- which way -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ladder(monkeypatch):
    """Ways that are recorded; the first fails in its backward pass, the second gives its result."""
    monkeypatch.setattr(attention, "_works", {})
    used = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no kernel\nand more")

    def first(row, query, key, value, softmax):
        used.append("first")
        return Fails.apply(attend_by_parts(row, query, key, value, softmax))

    def second(row, query, key, value, softmax):
        used.append("second")
        return attend_by_parts(row, query, key, value, softmax)

    ways = SimpleNamespace(used=used, by_name={"first": first, "second": second})
    monkeypatch.setattr(attention, "_ways", lambda *_: ways.by_name)
    return ways


def test_a_way_that_fails_is_followed_by_the_next_with_one_line(ladder, caplog):
    row, heads = segments_of([(3, [4, 5])]), random_heads(12)
    for _ in range(3):
        torch.testing.assert_close(attend(row, *heads, PLAIN), attend_by_parts(row, *heads, PLAIN))
    assert ladder.used == ["first", "second", "second", "second", "second"]  # the second is tried once, then used
    assert caplog.text.count("first is not used, because it failed with ValueError: no kernel.") == 1
    assert "second" not in caplog.text


def test_parts_are_the_last_way(ladder, caplog):
    row, heads = segments_of([(3, [4, 5])]), random_heads(12)
    del ladder.by_name["second"]
    torch.testing.assert_close(attend(row, *heads, PLAIN), attend_by_parts(row, *heads, PLAIN))
    assert ladder.used == ["first"]


def test_memory_that_runs_out_is_no_reason_for_another_way(ladder):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    ladder.by_name["first"] = full
    with pytest.raises(torch.OutOfMemoryError):
        attend(segments_of([(3, [4, 5])]), *random_heads(12), PLAIN)


@pytest.mark.parametrize(("error", "kept"), [(0.0, True), (0.01, True), (0.3, False)])
def test_the_flash_backend_of_flex_attention_must_agree_with_its_default(ladder, monkeypatch, caplog, error, kept):
    def backend(row, query, key, value, softmax):
        ladder.used.append("flash")
        return attend_by_parts(row, query, key * (1 + error), value, softmax)

    monkeypatch.setattr(attention, "attend_by_flex", ladder.by_name["second"])
    ladder.by_name = {attention._FLASH_BACKEND: backend, "second": ladder.by_name["second"]}
    attend(segments_of([(3, [4, 5])]), *random_heads(12), PLAIN)
    assert ladder.used == (["flash", "second", "flash"] if kept else ["flash", "second", "second", "second"])
    assert ("failed with ArithmeticError: it differs from the default kernels by" in caplog.text) == (not kept)


def test_the_ways_are_chosen_by_device_and_layer(monkeypatch):
    def names(device, softmax=PLAIN, own=None, dtype=torch.bfloat16):
        head = SimpleNamespace(device=torch.device(device), dtype=dtype, size=lambda _: 8)
        return list(attention._ways(head, head, softmax, own))

    monkeypatch.setattr(attention, "has_flash_backend", lambda device: False)
    flash = "the model's own flash attention"
    assert names("cpu") == []
    assert names("cuda") == ["FlexAttention", "varlen_attn"]
    assert names("cuda", dtype=torch.float32) == ["FlexAttention"]
    assert names("cuda", Softmax(scale=1, softcap=30.0)) == ["FlexAttention"]
    assert names("cuda", Softmax(scale=1, reach=Reach(8)), own=print) == [flash, "FlexAttention", "varlen_attn"]
    assert names("cuda", Softmax(scale=1, reach=Reach(chunk=8)), own=print) == ["FlexAttention"]
    monkeypatch.setattr(attention, "has_flash_backend", lambda device: True)
    assert names("cuda") == [attention._FLASH_BACKEND, "FlexAttention", "varlen_attn"]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"
)  # torch's own, when it loads its compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_flex_attention_is_compiled_once_for_all_lengths(backend):
    """As on CUDA, where the backend makes kernels; `eager` only traces."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("compiling for CPU needs g++")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(flex_attention, dynamic=True, backend=backend)
    for seed, batch in enumerate([[(50, [190, 80])], [(70, [150, 60]), (3, [7, 9])], [(30, [300, 200])]]):
        row = segments_of(batch)
        query, key, _ = random_heads(sum(row.sizes), seed=seed)
        ours = compiled(query, key, key, block_mask=make_block_mask(row, Reach()), enable_gqa=True)
        theirs = scaled_dot_product_attention(
            query, *[key.repeat_interleave(2, dim=1)] * 2, attn_mask=seen_by_definition(batch)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
