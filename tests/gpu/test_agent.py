"""Agent attention at the size of images and videos: numbers, bits, one graph, no wait for the device."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import agent_grid, pool_tokens
from attn_plugins.pipelines.benching.oracle import rounding_kernels
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.agent import CASES
from tests.gpu.place import counted_compiles
from tests.gpu.test_sync import no_sync
from tests.support.agents import pytorchs
from tests.support.tolerance import allowance

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32]
# All head sizes in one precision, some in the others: each is a compile of six kernels.
HEAD_DIMS = [(torch.bfloat16, dim) for dim in (40, 64, 72, 80, 96, 128)]
HEAD_DIMS += [(dtype, dim) for dtype in (torch.float16, torch.float32) for dim in (40, 80, 128)]


def rand(place, *shape, dtype, seed=1):
    rng = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(shape, generator=rng, device=place.device, dtype=dtype)


def problem(place, head_dim, dtype, agents=256, tokens=4096, **more):
    """q, k, v and agents by name, of two heads unless `more` says otherwise."""
    if place.tiny:
        tokens, agents = max(tokens // 64, 2), max(agents // 16, min(agents, 2))
    q, k, v = place.qkv(tokens, head_dim, dtype, **{"heads": 2} | more)
    means = rand(place, *q.shape[:2], agents, head_dim, dtype=dtype)
    return {"q": q, "k": k, "v": v, "agents": means}


def with_biases(place, tensors, items=1):
    """Both biases, of each head its own."""
    q, agents = tensors["q"], tensors["agents"]
    shapes = (items, q.shape[1], agents.shape[2], q.shape[2]), (items, q.shape[1], q.shape[2], agents.shape[2])
    names = ("bias_aggregate", "bias_broadcast")
    biases = (rand(place, *shape, dtype=q.dtype, seed=2) for shape in shapes)
    return tensors | dict(zip(names, biases, strict=True))


def results(place, attend, tensors, dtype, frozen="-", gradients=True, **options):
    """Output and gradients by name, for an upstream that is alike for all callers."""
    leaves = {name: t.detach().requires_grad_(not name.startswith(frozen)) for name, t in tensors.items()}
    out = attend(**leaves, **options)
    names = [name for name in leaves if not name.startswith(frozen)] if gradients else []
    grads = place.grads(out, [leaves[name] for name in names], dtype) if names else ()
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def check(place, tensors, gradients=True, **options):
    """As near to float64 as the tolerance rule asks; a bias's gradient by PyTorch's products, as in tests/triton."""
    dtype = tensors["q"].dtype
    wide = {name: t.double() for name, t in tensors.items()}
    shared = {"dtype": dtype, "gradients": gradients, **options}
    found = results(place, agent_attention, tensors, backend=place.backend, **shared)
    exact = results(place, pytorchs, wide, **shared)
    with rounding_kernels(tensors["q"]):
        theirs = results(place, pytorchs, tensors, **shared)
        theirs |= results(place, pytorchs, tensors, frozen="bias", **shared)
    assert found["out"].stride() == torch.empty_like(tensors["q"]).stride()
    for name, right in exact.items():
        error, allowed = (found[name].double() - right).abs().max().item(), allowance(theirs[name], right)
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
        assert found[name].dtype == dtype and found[name].shape == right.shape


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sampled_rows_and_all_gradients_at_scale(place, case, dtype, room):
    """Up to 65,536 tokens, published and trained; the definition shares nothing with the library."""
    room(30)
    case = case.shrunk() if place.tiny else case
    prepared = case.prepare(Setting(dtype, case.head_dims[-1], place.device, place.tiny))
    for side in prepared.sides:
        if side.role != "dense":
            verdict = prepared.oracle.judge(side.build().run, gradients=True)
            assert verdict.right, (side.name, verdict.errors)


@pytest.mark.parametrize(("dtype", "head_dim"), HEAD_DIMS, ids=str)
def test_head_sizes_and_precisions(place, dtype, head_dim):
    check(place, problem(place, head_dim, dtype), scale_broadcast=head_dim**-0.15, shortcut=0.075)


@pytest.mark.parametrize(("dtype", "head_dim"), HEAD_DIMS, ids=str)
@pytest.mark.parametrize("tokens", [4096, 197])
def test_biases(place, dtype, head_dim, tokens):
    """197 tokens and 49 agents are those of the trained models, and leave rows of a bias that begin anywhere."""
    agents = 256 if tokens == 4096 else 49
    check(place, with_biases(place, problem(place, head_dim, dtype, agents, tokens, batch=2)))


@pytest.mark.parametrize("kind", ["alike for all heads", "alike for all agents", "alike for all keys", "transposed"])
def test_biases_of_any_shape(place, kind):
    tensors = with_biases(place, problem(place, 64, torch.bfloat16, 49, 197))
    name = "bias_aggregate"
    whole = tensors[name]
    if kind == "transposed":
        tensors[name] = whole.transpose(-1, -2).contiguous().transpose(-1, -2)
        check(place, tensors)
    else:
        axis = {"alike for all heads": 1, "alike for all agents": 2, "alike for all keys": 3}[kind]
        tensors[name] = whole.narrow(axis, 0, 1)
        check(place, tensors, gradients=axis < 3)  # that of what is alike for all keys is 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("agents", [1, 16, 49, 1024])
def test_numbers_of_agents(place, agents, dtype):
    """Of one agent only the output: its gradients are 0, and what is left of them is rounding."""
    check(place, problem(place, 64, dtype, agents), gradients=agents > 1)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_text_beside_the_grid_is_exact(place, head_dim):
    """77 tokens before, 5 after, two query heads for each KV head, a convolution of what is between."""
    before, after = (3, 2) if place.tiny else (77, 5)
    side = 8 if place.tiny else 48
    tensors = problem(place, head_dim, torch.bfloat16)
    tokens = before + side**2 + after
    q, k, v = place.qkv(tokens, head_dim, torch.bfloat16, heads=4, kv_heads=2)
    agents = rand(place, 1, 4, tensors["agents"].shape[2], head_dim, dtype=q.dtype)
    weight = 0.1 * rand(place, 4 * head_dim, 1, 3, 3, dtype=q.dtype)
    tensors = {"q": q, "k": k, "v": v, "agents": agents, "dwc_weight": weight, "dwc_bias": weight[:, 0, 0, 0].clone()}
    check(place, tensors, exact_before=before, exact_after=after, grid=(side, side), shortcut=0.075)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_ten_times_the_same_bits(place, dtype, biases):
    """With other work on the GPU in between, so that programs are scheduled in another order; shares are summed."""
    tensors = problem(place, 64, dtype, heads=8)
    tensors = with_biases(place, tensors) if biases else tensors

    def step():
        return results(place, agent_attention, tensors, dtype, backend=place.backend, shortcut=0.075)

    first = step()
    noise = rand(place, *[64 if place.tiny else 4096] * 2, dtype=torch.float32)
    for _ in range(2 if place.tiny else 9):
        noise = (noise @ noise).tanh()
        again = step()
        assert all(torch.equal(first[name], again[name]) for name in first)


def pooled(q, k, v, grid, to, backend):
    agents = pool_tokens(q, grid, to)
    return agent_attention(q, k, v, agents, scale_broadcast=q.shape[-1] ** -0.15, shortcut=0.075, backend=backend)


def test_one_graph_forward_and_backward(place):
    grid = (8, 9) if place.tiny else (64, 60)
    to = agent_grid(grid, grid[0] * grid[1] // 16)
    leaves = place.qkv(grid[0] * grid[1], 64, torch.bfloat16, grad=True)
    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager" if place.tiny else "inductor")

    def plain(q, k, v):  # the allowance is our own uncompiled error: fusing rounds elsewhere
        return pooled(q, k, v, grid, to, "cpu" if q.dtype == torch.float64 else place.backend)

    place.check(lambda *t: compiled(*t, grid, to, place.backend), plain, leaves)


def test_new_resolutions_need_no_new_kernel(place, on_gpu):
    def run(height, width):
        leaves = place.qkv(height * width, 64, torch.bfloat16, grad=True)
        to = agent_grid((height, width), height * width // 16)
        place.grads(pooled(*leaves, (height, width), to, "triton"), leaves)

    run(64, 64)  # whose few blocks of agents are split into shares
    run(96, 160)
    with counted_compiles() as compiled:
        for height, width in ((80, 96), (96, 96), (112, 64), (67, 71)):
            run(height, width)
    assert not compiled


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_no_call_waits_for_the_device(place, on_gpu, biases):
    tensors = problem(place, 64, torch.bfloat16, 49, 197, batch=2)
    tensors = with_biases(place, tensors) if biases else tensors
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    upstream = torch.randn_like(leaves[0])

    def step():
        out = agent_attention(
            **dict(zip(tensors, leaves, strict=True)), exact_before=3, shortcut=0.075, backend="triton"
        )
        torch.autograd.grad(out, leaves, upstream)

    step()  # compiles the kernels
    with no_sync():
        step()
