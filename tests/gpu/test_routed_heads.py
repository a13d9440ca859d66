"""routed_head_attention at the size of texts and images, against float64; its bits, no wait for the device."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import routed_head_attention
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.routed_heads import CASES
from tests.gpu.place import counted_compiles
from tests.gpu.test_sync import no_sync

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def routed(place, tokens, head_dim, dtype, heads=8, kv_heads=2, batch=2, share=0.5):
    """q, k, v, and gates of which the share is not 0; a head that no token uses and one that all use."""
    tokens = max(tokens // 32, 40) if place.tiny else tokens
    q, k, v = place.qkv(tokens, head_dim, dtype, heads=heads, kv_heads=kv_heads, batch=batch)
    rng = torch.Generator(place.device).manual_seed(1)
    scores = torch.rand(batch, tokens, heads, generator=rng, device=place.device)
    used = scores < share
    used[..., 0], used[..., -1] = False, True
    return q, k, v, ((scores + 0.5) * used).to(dtype)


def gated(q, k, v, gates, causal):
    """Dense attention times the gates: PyTorch's, in the precision of q."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q, *(t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v)), is_causal=causal
    )
    return out * gates.transpose(1, 2)[..., None].to(q.dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_against_float64(place, head_dim, dtype, causal):
    *tensors, gates = routed(place, 2048, head_dim, dtype)
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    place.check(
        lambda q, k, v: routed_head_attention(q, k, v, gates, causal=causal, backend=place.backend),
        lambda q, k, v: gated(q, k, v, gates, causal),
        leaves,
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens == 8192], ids=lambda case: case.name)
def test_the_benchmarks_cases(place, case):
    setting = Setting(torch.bfloat16, 16 if place.tiny else 128, place.device, tiny=place.tiny)
    made = (case.shrunk() if place.tiny else case).prepare(setting)
    ours = next(side for side in made.sides if side.role == "ours")
    verdict = made.oracle.judge(ours.build().run, gradients=True)
    assert verdict.right, verdict.errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ten_times_the_same_bits(place, dtype):
    q, k, v, gates = routed(place, 4096, 64, dtype)
    first = routed_head_attention(q, k, v, gates, causal=True, backend=place.backend)
    for _ in range(9):
        assert torch.equal(first, routed_head_attention(q, k, v, gates, causal=True, backend=place.backend))


def test_no_call_waits_for_the_device(place, on_gpu):
    q, k, v, gates = routed(place, 4096, 64, torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, gates)]

    def step():
        out = routed_head_attention(*leaves, causal=True, dense_backward=True, backend="triton")
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    step()  # compiles the kernels, and makes the plan of the backward
    with no_sync():
        step()


def test_captured_in_a_graph_with_lists_that_change(place, on_gpu):
    q, k, v, gates = routed(place, 4096, 64, torch.bfloat16)
    routed_head_attention(q, k, v, gates, causal=True, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routed_head_attention(q, k, v, gates, causal=True, backend="triton")
    gates.copy_(gates.roll(5, 1).flip(2))
    graph.replay()
    assert torch.equal(out, routed_head_attention(q, k, v, gates, causal=True, backend="triton"))


def test_new_lengths_need_no_new_kernel(place, on_gpu):
    def run(tokens):
        q, k, v, gates = routed(place, tokens, 64, torch.bfloat16)
        routed_head_attention(q, k, v, gates, causal=True, backend="triton")

    run(2048)
    with counted_compiles() as compiled:
        for tokens in (1999, 2500, 4096):
            run(tokens)
    assert not compiled
