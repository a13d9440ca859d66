"""No call waits for the device: with a plan that is known, with one that a dynamic method makes on the device."""

from __future__ import annotations

import contextlib

import torch

from attn_plugins.ops import block_sparse_attention, decode_attention, neighborhood_attention


@contextlib.contextmanager
def no_sync():
    """PyTorch raises wherever the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_sees_a_sync(place, on_gpu):
    flag = torch.ones(1, device=place.device)
    try:
        with no_sync():
            bool(flag)
    except RuntimeError:
        return
    raise AssertionError("reading a value back did not raise: this PyTorch cannot tell us of syncs")


def test_a_known_plan_never_syncs(place, on_gpu):
    leaves = place.qkv(16 * 32 * 32, 64, torch.bfloat16, grad=True)
    upstream = torch.randn_like(leaves[0])

    def step():
        options = {"grid": (16, 32, 32), "window": (8, 16, 16), "stride": (1, 2, 2), "backend": "triton"}
        torch.autograd.grad(neighborhood_attention(*leaves, **options), leaves, upstream)

    step()  # makes the plan and uploads it, compiles the kernels
    with no_sync():
        step()


def test_a_plan_made_on_the_device_never_syncs(place, on_gpu):
    """Not even in its first call: such a plan is new in every call."""
    leaves = place.qkv(64 * 128, 64, torch.bfloat16, grad=True)
    upstream = torch.randn_like(leaves[0])

    def step(seed):
        plan = place.lists_plan(128, 0.2, heads=4, seed=seed, on_device=True)
        torch.autograd.grad(block_sparse_attention(*leaves, plan, backend="triton"), leaves, upstream)

    step(0)  # compiles the kernels
    with no_sync():
        step(1)


def test_a_plan_made_on_the_device_gives_the_same(place):
    """As the same lists made on the host."""
    blocks = 6 if place.tiny else 64
    host = place.lists_plan(blocks, 0.3, heads=4)
    there = place.lists_plan(blocks, 0.3, heads=4, on_device=True)
    for name in ("lists", "full", "count"):
        setattr(there, name, getattr(host, name).to(place.device))
    leaves = place.qkv(host.q_length, 64, torch.bfloat16, grad=True)
    one, other = (block_sparse_attention(*leaves, plan, backend=place.backend) for plan in (host, there))
    assert torch.equal(one, other)
    for a, b in zip(place.grads(one, leaves), place.grads(other, leaves), strict=True):
        assert torch.equal(a, b)


def test_decoding_never_syncs(place, on_gpu):
    q = torch.randn(1, 8, 1, 128, device=place.device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 4096, 128, device=place.device, dtype=torch.bfloat16)
    ranges = torch.tensor([[[[0, 1000]], [[1000, 4096]]]], device=place.device)
    decode_attention(q, k, v, ranges=ranges, backend="triton")
    with no_sync():
        decode_attention(q, k, v, ranges=ranges, backend="triton")
