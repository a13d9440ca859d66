"""VMoBA in each precision by the tolerance rule, and as operators of compiled graphs."""

import pytest
import torch

from attn_plugins.ops import vmoba_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.vmoba import causal
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens
from attn_plugins.ops.vmoba.layout import decode, encode, fit_block, fit_tile
from attn_plugins.ops.vmoba.selection import Selection
from attn_plugins.sequence import Sequence
from tests.support.tolerance import sdpa, within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [pytest.param(False, id="pooled"), pytest.param(True, id="exact")]
GRID, BLOCK, TEXT = (8, 9, 10), (3, -1, 4), 7


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(dtype, heads=(4, 2, 2)):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, 720 + TEXT, 32, generator=rng, dtype=torch.float64).to(dtype) for h in heads]


def mask_of(q, k, how, exact):
    """(B, H, N, N): what the operator itself chose, which rounding may tip between two blocks."""
    sizes = fit_block(GRID, BLOCK)
    spec = encode(Sequence(GRID, 0, TEXT), sizes, fit_tile(sizes, 40))
    one = decode(spec)[0][1]
    if exact:
        rows = choose_for_tokens(q, k, spec, how, 0.2)
    else:
        lists, count = choose_for_tiles(q, k, spec, how, 0.2)
        first = torch.arange(lists.shape[-1]) < count[..., None]
        rows = torch.zeros(*lists.shape[:3], one.count, dtype=torch.bool).scatter_(-1, lists.long(), first)
        rows = rows[:, :, one.tile_of]
    mask = torch.ones(*rows.shape[:2], 720 + TEXT, 720 + TEXT, dtype=torch.bool)
    mask[:, :, :720, :720] = rows[..., one.own[one.tile_of]]
    return mask


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "scale"), [("topk", 0.2), ("threshold", 0.2), ("topk", 8.0)])
def test_as_good_as_pytorch_in_the_same_precision(rule, scale, dtype, exact):
    """A scale of 8 makes scores of some hundred, whose exponential would be inf.

    There the exact form's gradients are an exception: they take a merged LSE, which is rounded twice, and at scores of
    hundreds the rounding of the LSE is all of the error.
    """
    one = inputs(dtype)
    how = Selection(rule, k_blocks=3, tau=0.4)
    mask = mask_of(one[0], one[1], how, exact)
    upstream = torch.randn(one[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    options = {"grid": GRID, "block": BLOCK, "tile": 40, "text_after": TEXT, "scale": scale}
    ways = []
    for attend, kind in (
        (lambda *t: vmoba_attention(*t, **options, rule=rule, k_blocks=3, tau=0.4, exact=exact), dtype),
        (lambda *t: sdpa(*t, mask, scale), dtype),
        (lambda *t: masked_attention(*t, mask, scale)[0], torch.float64),
    ):
        tensors = [t.detach().to(kind).requires_grad_() for t in one]
        out = attend(*tensors)
        ways.append([out.detach(), *torch.autograd.grad(out, tensors, upstream.to(kind))])
    names = ("out",) if exact and scale == 8.0 else ("out", "grad q", "grad k", "grad v")
    for name, ours, theirs, exactly in zip(names, *ways, strict=False):
        assert within(ours, theirs, exactly), name


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize("text", [0, [[5, 2], [5, 4]]], ids=str)
@pytest.mark.parametrize("options", [{"k_blocks": 2}, {"rule": "threshold", "tau": 0.4, "scope": "head"}], ids=str)
def test_one_graph_with_gradients(options, text, exact):
    def attend(q, k, v):
        return vmoba_attention(
            q, k, v, grid=(6, 8), block=(2, 4), exact=exact, text_before=text, return_lse=True, **options
        )

    length = 48 + (text[0][0] if text else 0)
    tensors = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    upstream = [torch.randn(2, 3, length, *tail, dtype=torch.float64) for tail in ((8,), ())]
    upstream[1].masked_fill_(attend(*tensors)[1].isinf(), 0.0)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*tensors), attend(*tensors)
    grads = [torch.autograd.grad(pair, tensors, upstream) for pair in (found, expected)]
    for one, other in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_the_ops_are_sound_for_torch_library():
    """Schema, fake tensors, autograd registration and AOT dispatch, by PyTorch's own checks."""
    q, k, v = (torch.randn(2, 3, 15, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    spec = encode(Sequence((12,), 3), (4,), (2,))
    setting = (spec, "threshold", "head", [0, 1, 0], 0.5, 0.3, "cpu")
    ops = torch.ops.attn_plugins
    for op in (ops.vmoba_tiles.default, ops.vmoba_tokens.default):
        torch.library.opcheck(op, (q.detach(), k.detach(), *setting))
    torch.library.opcheck(
        causal._choice._opoverload, (q.detach(), k.detach(), encode(Sequence((15,)), (4,), (4,)), 2, "cpu")
    )
    lists, count = ops.vmoba_tiles(q.detach(), k.detach(), *setting)
    rows = ops.vmoba_tokens(q.detach(), k.detach(), *setting)
    for name, tail in (
        ("block_lists", (lists, count, 0.3, spec, "cpu")),
        ("block_rows", (rows, 0.3, spec, False, "cpu")),
    ):
        torch.library.opcheck(getattr(ops, name).default, (q, k, v, *tail))
        detached = [t.detach() for t in (q, k, v)]
        out, lse = getattr(ops, name)(*detached, *tail)
        backward = getattr(ops, f"{name}_backward").default
        for grad_lse in (None, torch.randn_like(lse)):
            torch.library.opcheck(backward, (torch.randn_like(out), grad_lse, *detached, out, lse, *tail))


@pytest.mark.parametrize("exact", FORMS)
def test_autocast_does_not_touch_the_gate(exact):
    q, k, v = inputs(torch.float32, (2, 2, 2))
    options = {"grid": GRID, "block": BLOCK, "rule": "threshold", "tau": 0.3, "text_after": TEXT, "exact": exact}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vmoba_attention(q, k, v, **options)
    assert torch.equal(found, vmoba_attention(q, k, v, **options))
