"""Which backend runs, what it refuses, and what a compiled graph sees of it."""

import pytest
import torch

from attn_plugins.ops import block_sparse_attention, neighborhood_attention
from attn_plugins.ops.block_sparse.triton import configs, launch
from attn_plugins.ops.block_sparse.triton.autotune import autotune
from attn_plugins.ops.block_sparse.triton.configs import Config
from attn_plugins.plan.block_plan import BlockPlan

PLAN = BlockPlan.from_lists([(0, 16), (16, 16)], [(0, 16), (16, 16)], [[0], [1, 0]])
HALF = torch.float16


def inputs(dtype=torch.float32, dim=16, tokens=32):
    return [torch.randn(1, 1, tokens, dim, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def launches(monkeypatch):
    """What the Triton backend was asked to run."""
    seen = []
    forward = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args: seen.append(args[3]) or forward(*args))
    return seen


def test_triton_runs_when_it_is_asked_for(launches):
    block_sparse_attention(*inputs(), PLAN, backend="triton")
    assert launches == [PLAN]


def test_auto_is_the_cpu_backend_on_a_cpu(launches):
    block_sparse_attention(*inputs(), PLAN)
    block_sparse_attention(*inputs(torch.float64), PLAN)
    assert not launches


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (inputs(torch.float64), "the kernels compute in float16, bfloat16, float32, not float64"),
        (inputs(dim=320), "head sizes of up to 256, not 320"),
    ],
)
def test_what_the_kernels_refuse(tensors, named):
    with pytest.raises(ValueError, match=f"backend='triton': .*{named}.*use 'auto' or 'cpu'"):
        block_sparse_attention(*tensors, PLAN, backend="triton")
    with pytest.raises(ValueError, match=named):
        neighborhood_attention(*tensors, grid=(32,), window=3, backend="triton")


def test_one_graph_with_gradients():
    def attend(q, k, v, height, width):
        return neighborhood_attention(
            q, k, v, grid=(height, width), window=3, text_after=2, backend="triton", return_lse=True
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for size in ((4, 5), (5, 6)):
        tensors = inputs(tokens=size[0] * size[1] + 2)
        found, expected = compiled(*tensors, *size), attend(*tensors, *size)
        grads = [torch.autograd.grad(pair, tensors, [torch.ones_like(t) for t in pair]) for pair in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True))


def test_the_ops_are_sound_for_torch_library():
    tensors = inputs()
    torch.library.opcheck(torch.ops.attn_plugins.block_sparse.default, (*tensors, 0.3, [PLAN.key], "triton"))
    out, lse = torch.ops.attn_plugins.block_sparse(*(t.detach() for t in tensors), 0.3, [PLAN.key], "triton")
    backward = torch.ops.attn_plugins.block_sparse_backward.default
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(
        backward, (torch.randn_like(out), None, *detached, out, lse, 0.3, [PLAN.key], "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_every_target_precision_and_head_size_has_a_config():
    for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "interpreter"):
        for dtype in (HALF, torch.bfloat16, torch.float32):
            for dim in (8, 40, 64, 72, 128, 160, 256):
                assert all(isinstance(configs.choose(kernel, target, dtype, dim), Config) for kernel in configs.KERNELS)


def test_an_override_stands_in_its_rows_place_and_goes_away():
    mine = Config(16, 16, 1, 1)
    before = configs.choose("forward", "sm_90", HALF, 96)
    with configs.override("sm_90", HALF, 96, forward=mine):
        assert configs.choose("forward", "sm_90", torch.bfloat16, 128) == mine  # the row of 16 bits up to 128
        assert configs.choose("grad_q", "sm_90", HALF, 96) != mine
    assert configs.choose("forward", "sm_90", HALF, 96) == before


def test_steps_are_no_longer_than_the_blocks():
    assert configs.fitted(Config(128, 64, 4, 2), 60, 20) == Config(64, 32, 4, 2)
    assert configs.fitted(Config(128, 64, 4, 2), 1, None) == Config(16, 64, 4, 2)


def test_an_override_is_what_runs():
    tensors = [t.detach() for t in inputs()]
    with configs.override("interpreter", torch.float32, 16, forward=Config(16, 16, 4, 1)):
        assert launch.config_of("forward", tensors[0], PLAN) == Config(16, 16, 4, 1)
        one = block_sparse_attention(*tensors, PLAN, backend="triton")
    torch.testing.assert_close(one, block_sparse_attention(*tensors, PLAN, backend="reference"))


def test_autotune_keeps_the_fastest_that_fits():
    """By a clock that counts the calls: the third config tried is the fastest; one does not fit."""
    from triton.runtime.errors import OutOfResources

    tensors = [t.detach() for t in inputs(HALF)]
    tried = [Config(16, 16, 2, 1), Config(16, 16, 4, 2), Config(16, 16, 8, 1)]
    times = iter([5.0, OutOfResources(1, 2, "shared memory"), 1.0, 3.0])

    def clock(run):
        time = next(times)
        if isinstance(time, Exception):
            raise time
        run()
        return time

    with configs.override("interpreter", HALF, 16):
        found = autotune(*tensors, PLAN, kernels=["grad_kv"], candidates=tried, measure=clock)
        assert found == {"grad_kv": (tried[1], 1.0)}
        assert configs.choose("grad_kv", "interpreter", HALF, 16) == tried[1]
    assert configs.choose("grad_kv", "interpreter", HALF, 16) != tried[1]


def test_autotune_needs_a_gpu():
    with pytest.raises(RuntimeError, match="on a GPU, and there is none here"):
        autotune(*inputs(HALF), PLAN)


def test_there_are_configs_to_try():
    for kernel in configs.KERNELS:
        tried = configs.candidates(kernel, HALF, 128)
        assert len(set(tried)) == len(tried) > 6 and configs.choose(kernel, "sm_90", HALF, 128) in tried
