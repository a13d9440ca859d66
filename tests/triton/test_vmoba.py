"""VMoBA's kernels, interpreted: the choice against the definition, attention and gradients by the tolerance rule."""

import math

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops import vmoba_attention  # noqa: E402
from attn_plugins.ops.block_sparse.reference import masked_attention  # noqa: E402
from attn_plugins.ops.block_sparse.triton.configs import KERNELS, Config  # noqa: E402
from attn_plugins.ops.vmoba import causal  # noqa: E402
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens  # noqa: E402
from attn_plugins.ops.vmoba.layout import decode, encode, fit_tile  # noqa: E402
from attn_plugins.ops.vmoba.rows_op import attend_rows  # noqa: E402
from attn_plugins.ops.vmoba.selection import Selection  # noqa: E402
from attn_plugins.ops.vmoba.triton import best_blocks, configs, gate  # noqa: E402
from attn_plugins.sequence import Sequence  # noqa: E402
from tests.support.tolerance import sdpa, within  # noqa: E402

RULES = [("topk", {"k_blocks": 3}), ("threshold", {"tau": 0.4}), ("top_p", {"tau": 0.6})]


def draw(count, heads, tokens, size, dtype, seed=0):
    """(B, H, N, D) views of (B, N, H, D)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, tokens, heads, size, generator=rng, dtype=torch.float64).to(dtype).transpose(1, 2)


def check(q, k, v, attend, mask, scale):
    """Output, LSE and gradients of `attend` (q, k, v to the two), as good as PyTorch's masked attention."""
    rng = torch.Generator().manual_seed(7)
    upstream = [torch.randn(shape, generator=rng) for shape in (q.shape, q.shape[:3])]
    ways = []
    for run, kind in (
        (attend, q.dtype),
        (lambda *t: (sdpa(*t, mask, scale), masked_attention(*t, mask, scale)[1]), q.dtype),
        (lambda *t: masked_attention(*t, mask, scale), torch.float64),
    ):
        inputs = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        out, lse = run(*inputs)
        finite = lse.masked_fill(lse.isneginf(), 0.0)
        given = [t.to(one.dtype) for t, one in zip(upstream, (out, finite), strict=True)]
        ways.append([out.detach(), finite.detach(), *torch.autograd.grad((out, finite), inputs, given)])
    for name, one, theirs, exact in zip(("out", "lse", "dq", "dk", "dv"), *ways, strict=True):
        assert within(one, theirs, exact), name


def row_mask(selected, spec):
    """(B, H, N, N) bool of the blocks that each grid token selected, with the text of each item around."""
    masks = []
    for items, one in decode(spec):
        sequence = one.sequence
        grid = slice(sequence.text_before, sequence.text_before + sequence.tokens)
        real = torch.zeros(sequence.length, dtype=torch.bool)
        real[one.real_tokens] = True
        mask = (real[:, None] & real).repeat(*selected[items].shape[:2], 1, 1)
        mask[:, :, grid, grid] = selected[items][..., one.own[one.tile_of]]
        masks.append(mask)
    return torch.cat(masks)


# Grid, block, (text before, after), heads, KV heads, head size, dtype: a short last block on each axis, one block
# longer than all others and than a slab, one that is everything, text on both sides, alone and in its own lengths.
EXACT = [
    ((3, 5, 4), (2, 3, 3), (0, 0), 2, 1, 16, torch.float32),
    ((2, 3, 5), (2, 2, 3), (3, 2), 2, 1, 40, torch.bfloat16),
    ((90,), (70,), (0, 5), 1, 1, 16, torch.float16),
    ((7, 9), (9, 99), ((4, (0, 3)), (5, (5, 2))), 1, 1, 16, torch.float32),
    ((4, 7), (1, 7), (0, (3, (0, 1))), 2, 2, 8, torch.bfloat16),
]


@pytest.mark.parametrize(("grid", "block", "texts", "heads", "kv_heads", "size", "dtype"), EXACT, ids=str)
def test_rows_as_good_as_pytorch_in_the_same_precision(grid, block, texts, heads, kv_heads, size, dtype):
    lengths = [text if isinstance(text, int) else text[0] for text in texts]
    valid = [text if isinstance(text, int) else text[1] for text in texts]
    batch = 2 if any(isinstance(text, tuple) for text in texts) else 1
    sizes = tuple(min(b, g) for b, g in zip(block, grid, strict=True))
    spec = encode(Sequence(grid, *lengths, *valid), sizes, sizes)
    tokens = math.prod(grid) + sum(lengths)
    q, k, v = (draw(batch, h, tokens, size, dtype, i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    one = decode(spec)[0][1]
    rng = torch.Generator().manual_seed(3)
    selected = torch.rand(batch, heads, math.prod(grid), one.count, generator=rng) < 0.4
    selected.scatter_(-1, one.own[one.tile_of].expand(batch, heads, -1)[..., None], True)
    mask = row_mask(selected, spec)
    check(q, k, v, lambda *t: attend_rows(*t, selected, 0.3, spec, backend="triton"), mask, 0.3)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 6.0])
def test_any_scale(scale):
    spec = encode(Sequence((40,)), (16,), (16,))
    q, k, v = (draw(1, 1, 40, 16, torch.float32, i) for i in range(3))
    selected = torch.rand(1, 1, 40, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    selected.scatter_(-1, (torch.arange(40) // 16)[None, None, :, None], True)
    found = attend_rows(q, k, v, selected, scale, spec, backend="triton")
    mask = row_mask(selected, spec)
    assert within(
        found[0], sdpa(q, k, v, mask, scale), masked_attention(*(t.double() for t in (q, k, v)), mask, scale)[0]
    )


@pytest.mark.parametrize(("block", "dtype"), [(20, torch.float32), (16, torch.bfloat16)], ids=str)
def test_no_query_sees_what_comes_after_it(block, dtype):
    q, k, v = (draw(1, h, 90, 16, dtype, i) for i, h in enumerate((2, 1, 1)))
    spec = encode(Sequence((90,)), (block,), (block,))
    selected = causal._choice(q, k, spec, 3, "triton")
    assert torch.equal(selected, causal._choice(q, k, spec, 3, "cpu"))
    mask = row_mask(selected, spec) & torch.ones(90, 90, dtype=torch.bool).tril()
    check(q, k, v, lambda *t: attend_rows(*t, selected, 0.3, spec, causal=True, backend="triton"), mask, 0.3)


@pytest.mark.parametrize("scope", ["query", "head"])
@pytest.mark.parametrize(("rule", "number"), RULES)
def test_the_choice_is_that_of_the_definition(rule, number, scope):
    """Random scores are never so near each other that float32 sums in another order would tell."""
    grid, block = (3, 5, 7), (2, 3, 3)
    spec = encode(Sequence(grid, 2), block, fit_tile(block, 8))
    q, k = draw(2, 2, 107, 24, torch.bfloat16), draw(2, 1, 107, 24, torch.bfloat16, 1)
    how = Selection(rule, scope, **number, max_blocks=6)
    for choose in (choose_for_tokens, choose_for_tiles):
        ours, theirs = (choose(q, k, spec, how, 0.2, backend) for backend in ("triton", "cpu"))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other), choose.__name__


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_ties_go_to_the_lower_number(count):
    """Keys that come in three kinds, and queries with a 0 of either sign in all columns but one."""
    k = torch.zeros(1, 1, 36, 16)
    k[..., 0] = torch.tensor([1.0, 0.0, -1.0]).repeat_interleave(4).repeat(3)
    q = torch.zeros(1, 1, 36, 16)
    q[..., 0] = torch.tensor([2.0, -2.0, 0.0, -0.0]).repeat(9)
    spec = encode(Sequence((36,)), (4,), (4,))
    ours, theirs = (choose_for_tokens(q, k, spec, Selection(k_blocks=count), 1.0, way) for way in ("triton", "cpu"))
    assert torch.equal(ours, theirs) and (ours.sum(-1) == count).all()


def test_more_blocks_than_a_program_holds_are_ranked_by_pytorch(monkeypatch):
    monkeypatch.setattr(gate, "MOST_BLOCKS", 4)
    q, k = draw(1, 1, 40, 16, torch.float32), draw(1, 1, 40, 16, torch.float32, 1)
    spec = encode(Sequence((40,)), (8,), (8,))
    assert best_blocks(q, k, decode(spec)[0][1], 2) is None
    for choose in (
        lambda backend: choose_for_tokens(q, k, spec, Selection(k_blocks=2), 1.0, backend),
        lambda backend: causal._choice(q, k, spec, 2, backend),
    ):
        assert torch.equal(choose("triton"), choose("cpu"))


@pytest.mark.parametrize("exact", [False, True])
def test_the_whole_operator(exact):
    """From q, k, v in any strides to the output in q's: each item of a batch gets what it gets alone, bit for bit."""
    grid, block = (3, 4, 3), (2, 2, 3)
    options = {"grid": grid, "block": block, "exact": exact, "tile": 6, "k_blocks": 2, "backend": "triton"}
    q, k, v = (draw(2, h, 36 + 3, 32, torch.bfloat16, i)[..., ::2] for i, h in enumerate((2, 1, 1)))
    texts = [[3, 1], [3, 3]]
    whole = vmoba_attention(q, k, v, **options, text_after=texts)
    assert whole.stride() == torch.empty_like(q).stride()
    for b in range(2):
        alone = vmoba_attention(*(t[b : b + 1] for t in (q, k, v)), **options, text_after=texts[b : b + 1])
        assert torch.equal(whole[b : b + 1], alone)
    exactly = [t.double() for t in (q, k, v)]
    right = vmoba_attention(*exactly, **{**options, "backend": "reference"}, text_after=texts)
    usual = vmoba_attention(q, k, v, **{**options, "backend": "reference"}, text_after=texts)
    assert within(whole, usual, right)


@pytest.mark.parametrize("dim", [72, 256])
def test_head_sizes(dim):
    q, k, v = (draw(1, 1, 20, dim, torch.bfloat16, i) for i in range(3))
    spec = encode(Sequence((20,)), (7,), (7,))
    selected = choose_for_tokens(q, k, spec, Selection(k_blocks=2), 1.0, "triton")
    mask = row_mask(selected, spec)
    check(q, k, v, lambda *t: attend_rows(*t, selected, 0.1, spec, backend="triton"), mask, 0.1)


def test_padding_never_leaks():
    q, k, v = (draw(1, 1, 24, 16, torch.float32, i) for i in range(3))
    options = {
        "grid": (4, 5),
        "block": (2, 2),
        "k_blocks": 2,
        "exact": True,
        "text_after": [[4, 1]],
        "backend": "triton",
    }
    clean, found = (
        vmoba_attention(*(torch.cat([t[:, :, :21], torch.full_like(t[:, :, 21:], x)], 2) for t in (q, k, v)), **options)
        for x in (0.0, float("nan"))
    )
    assert torch.equal(clean, found) and (found[:, :, 21:] == 0).all()


def test_every_target_precision_and_head_size_has_a_config():
    for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "interpreter"):
        assert configs.slab(target) % configs.choose("forward", target, torch.bfloat16, 64).block_m == 0
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for dim in (8, 40, 64, 72, 128, 160, 256):
                assert all(isinstance(configs.choose(kernel, target, dtype, dim), Config) for kernel in KERNELS)
