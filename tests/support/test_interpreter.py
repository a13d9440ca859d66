"""bfloat16 in the interpreter, compared with PyTorch's own rounding."""

import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from tests.support.interpreter import interpreting, narrow, widen  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="the kernels of this process are not interpreted")


@pytest.fixture(autouse=True)
def _ready(interpreted):
    pass


@triton.jit
def product(a, b, out, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = row * N + column
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def arithmetic(a, b, sums, products, exponentials, larger, chosen, fused, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(sums + at, x + y)
    tl.store(products + at, -x * y)
    tl.store(exponentials + at, tl.exp2(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(larger + at, (x > y).to(tl.int32))
    tl.store(chosen + at, tl.where(x > y, x, y))
    tl.store(fused + at, tl.fma(x, y, x))


@triton.jit
def casts(wide, out, from_int, to_int, to_half, N: tl.constexpr):
    at = tl.arange(0, N)
    narrow = tl.load(wide + at).to(tl.bfloat16)
    tl.store(out + at, narrow)
    tl.store(from_int + at, (at - 3).to(tl.bfloat16))
    tl.store(to_int + at, narrow.to(tl.int32))
    tl.store(to_half + at, narrow.to(tl.float16))


def bf16(*values):
    return torch.tensor(values, dtype=torch.bfloat16)


def test_a_dot_of_bfloat16_is_a_dot():
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    product[(1,)](a, b, out, 32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_arithmetic_rounds_once_as_pytorch_does():
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    results = [torch.empty(64, dtype=torch.bfloat16) for _ in range(5)]
    larger = torch.empty(64, dtype=torch.int32)
    arithmetic[(1,)](a, b, *results[:3], larger, *results[3:], 64)
    expected = (a + b, -a * b, a.float().exp2().bfloat16(), torch.maximum(a, b), (a.float() * b.float() + a).bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert torch.equal(larger.bool(), a > b)


def test_casts():
    wide = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, -7.9, 3e4, float("inf"), float("nan")])  # two ties
    out, from_int = (torch.empty(8, dtype=torch.bfloat16) for _ in range(2))
    to_int, to_half = torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.float16)
    casts[(1,)](wide.nan_to_num(0.0, 0.0), out, from_int, to_int, to_half, 8)
    assert torch.equal(out, wide.nan_to_num(0.0, 0.0).bfloat16())
    assert from_int.tolist() == [-3, -2, -1, 0, 1, 2, 3, 4]
    assert torch.equal(to_int, out.int()) and torch.equal(to_half, out.half())


def test_rounding_is_pytorchs_for_every_kind_of_float32():
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    wide = torch.cat([bits.int().view(torch.float32), torch.tensor([float("inf"), float("nan"), -0.0, 3.4e38])])
    ours = torch.from_numpy(narrow(wide.numpy()).view("int16")).view(torch.bfloat16)
    theirs = wide.bfloat16()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()].view(torch.int16), theirs[~theirs.isnan()].view(torch.int16))
    assert torch.equal(torch.from_numpy(widen(narrow(bf16(0.1, -5).float().numpy()))), bf16(0.1, -5).float())


WITHOUT_REPAIR = """
import torch
from tests.support.test_interpreter import product
a, b = torch.ones(16, 16).bfloat16(), torch.ones(16, 16).bfloat16()
out = torch.empty(16, 16)
product[(1,)](a, b, out, 16)
print(out[0, 0].item())
"""


def test_without_the_repair_it_is_wrong(pytestconfig):
    """If this fails, Triton computes bfloat16 by itself now, and the repair can go."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_REPAIR], capture_output=True, text=True, cwd=pytestconfig.rootpath, check=True
    )
    assert float(done.stdout) > 1e6
