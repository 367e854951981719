"""Who sees whom in a stream: against a loop over the definition, and FlexAttention against SDPA."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sampo.scoring.attention import Segments, StreamRefused, attend, sees

# FlexAttention wants to be compiled, which takes half a minute here
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

lengths = st.integers(0, 90)
pairs = st.tuples(lengths, st.lists(st.integers(1, 150), min_size=1, max_size=2))
batches = st.lists(pairs, min_size=1, max_size=4)


def segments_of(batch):
    """Of pairs (tokens of the shared prompt, tokens of each branch)."""
    borders, at = [], 0
    for n_prompt, branches in batch:
        start = at
        for i, n_branch in enumerate(branches):
            first = start if i == 0 else at
            at = (start + n_prompt if i == 0 else at) + n_branch
            borders.append((first, at, start, start + n_prompt))
    return Segments(borders, torch.device("cpu"))


def seen_by_definition(batch):
    """A token sees its prompt and, causally, its own branch; a prompt token sees the prompt causally."""
    owners = []  # of each token: pair, and branch or None
    for pair, (n_prompt, branches) in enumerate(batch):
        owners += [(pair, None)] * n_prompt
        for branch, n_branch in enumerate(branches):
            owners += [(pair, branch)] * n_branch
    return torch.tensor(
        [
            [key <= query and owners[key] in ((pair, None), owner) for key in range(len(owners))]
            for query, owner in enumerate(owners)
            for pair in [owner[0]]
        ]
    )


def random_heads(n, *, heads=4, key_heads=2, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, n, 8), (1, key_heads, n, 8), (1, key_heads, n, 8)]
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


@given(batch=batches)
@settings(max_examples=40, deadline=None)
def test_the_views_are_those_of_the_definition(batch):
    segments = segments_of(batch)
    dense = seen_by_definition(batch)
    index = torch.arange(len(dense))
    assert torch.equal(sees(*segments.views)(0, 0, index[:, None], index), dense)
    assert segments.longest == dense.sum(dim=1).max()


@given(batch=batches)
@settings(max_examples=40, deadline=None)
def test_the_block_mask_is_the_one_that_torch_makes_of_the_dense_mask(batch):
    segments = segments_of(batch)
    dense = seen_by_definition(batch)
    n = len(dense)
    theirs = create_block_mask(lambda b, h, q, kv: dense[q, kv], None, None, n, n, device="cpu")
    ours = segments.block_mask
    assert ours.shape == theirs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(numbers, getattr(theirs, f"{kind}_num_blocks")), kind
        indices, expected = getattr(ours, f"{kind}_indices"), getattr(theirs, f"{kind}_indices")
        counted = torch.arange(indices.size(-1)) < numbers[..., None]  # what comes behind is not looked at
        assert torch.equal(indices[counted], expected[counted]), kind


@given(batch=batches, scale=st.sampled_from([None, 0.7]), key_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_by_segments_output_and_gradients_are_those_of_a_dense_mask(batch, scale, key_heads):
    segments, dense = segments_of(batch), seen_by_definition(batch)
    query, key, value = heads = random_heads(len(dense), key_heads=key_heads, grad=True)
    ours = attend(segments, query, key, value, scale)
    repeated = [x.repeat_interleave(4 // key_heads, dim=1) for x in (key, value)]
    theirs = scaled_dot_product_attention(query, *repeated, attn_mask=dense, scale=scale)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    for mine, reference in zip(
        *(torch.autograd.grad((x * weights).sum(), heads) for x in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)


@given(batch=batches, scale=st.sampled_from([None, 0.7]), key_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_flex_attention_gives_what_the_segments_give(batch, scale, key_heads):
    """Forward only: FlexAttention has no backward pass on CPU, compiled or not."""
    segments = segments_of(batch)
    heads = random_heads(segments.borders[-1][1], key_heads=key_heads)
    by_segments = attend(segments, *heads, scale)
    segments.way = "flex"
    torch.testing.assert_close(attend(segments, *heads, scale), by_segments, atol=1e-5, rtol=0)


def test_flex_attention_that_fails_is_refused_with_its_error():
    segments = segments_of([(3, [4, 5])])
    segments.way = "flex"
    heads = random_heads(12, grad=True)
    with pytest.raises(
        StreamRefused, match="FlexAttention failed with NotImplementedError: FlexAttention does not sup"
    ):
        attend(segments, *heads, None)


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
        segments = segments_of(batch)
        heads = random_heads(segments.borders[-1][1], seed=seed)
        ours = compiled(*heads, block_mask=segments.block_mask, enable_gqa=True)
        torch.testing.assert_close(ours, attend(segments, *heads, None), atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_way_is_chosen_by_the_device():
    assert Segments([(0, 1, 0, 0)], torch.device("cpu")).way == "segments"
    assert Segments([(0, 1, 0, 0)], torch.device("cuda", 0)).way == "flex"
