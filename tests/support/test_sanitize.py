"""Each fault that the sanitizer claims to find, made on purpose; and kernels without a fault, which pass."""

import contextlib

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from triton.runtime.errors import InterpreterError  # noqa: E402

from tests.support.interpreter import interpreting  # noqa: E402
from tests.support.sanitize import sanitize  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="the kernels of this process are not interpreted")


@pytest.fixture(autouse=True)
def _sanitized(interpreted, request):
    with contextlib.nullcontext() if request.function is test_everything_is_as_before_afterwards else sanitize():
        yield


@triton.jit
def copy(x, out, first, length, MASKED: tl.constexpr, OTHER: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    mask = at < length
    if not MASKED:
        value = tl.load(x + first + at)
    elif OTHER:
        value = tl.load(x + first + at, mask=mask, other=0.0)
    else:
        value = tl.load(x + first + at, mask=mask)
    tl.store(out + at, value, mask=mask)


@triton.jit
def spread(x, out, step, N: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + 1.0)


@triton.jit
def count(out, ATOMIC: tl.constexpr, first):
    if ATOMIC:
        tl.atomic_add(out + first, 1.0)
    else:
        tl.store(out + first, tl.load(out + first) + 1.0)


@triton.jit
def broadcast(out, program, N: tl.constexpr):
    """Every program reads what one of them writes."""
    if tl.program_id(0) == program:
        tl.store(out, 1.0)
    tl.store(out + 1 + tl.program_id(0), tl.load(out))


@triton.jit
def both(x, y, out, N: tl.constexpr):
    """Lanes that start in one tensor and run into another."""
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(tl.where(at < N // 2, x + at, y + at - N // 2)))


@triton.jit
def promise(x, limit):
    tl.device_assert(tl.load(x) < limit, "above the limit")


@triton.jit
def overflow(out, factor):
    tl.store(out, tl.program_id(0) + factor * factor)


@triton.jit
def half(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), 1.0)


def test_a_kernel_without_a_fault_passes():
    x, out = torch.randn(100), torch.empty(100)
    copy[(4,)](x, out, 0, 100, True, True, 32)
    assert torch.equal(out, x)


@pytest.mark.parametrize(("first", "off"), [(1, "off by 4 bytes"), (-3, "off by -12 bytes")])
def test_a_load_out_of_bounds(first, off):
    x, out = torch.randn(64), torch.empty(64)
    with pytest.raises(InterpreterError, match=f"load out of bounds in program .*{off} from argument 'x'"):
        copy[(2,)](x, out, first, 64, False, False, 32)


def test_a_store_out_of_bounds_into_the_same_storage():
    """A view's neighbours in its storage are out of bounds too."""
    x, out = torch.randn(64), torch.empty(128)[:48]
    with pytest.raises(InterpreterError, match="store out of bounds.*argument 'out'"):
        copy[(2,)](x, out, 0, 64, False, False, 32)


def test_an_atomic_out_of_bounds():
    with pytest.raises(InterpreterError, match="atomic out of bounds"):
        count[(1,)](torch.zeros(4), True, 4)


def test_lanes_in_two_tensors():
    with pytest.raises(InterpreterError, match="16 of 32 lanes"):
        both[(1,)](torch.zeros(16), torch.zeros(16), torch.empty(32), 32)


def test_the_last_byte_is_inside_and_tensors_without_elements_are_not_in_the_way():
    x, out = torch.randn(33)[1:], torch.empty(32)
    copy[(1,)](x, out, 0, 32, False, False, 32)
    assert torch.equal(out, x)
    copy[(1,)](torch.empty(0), torch.empty(0), 0, 0, True, True, 32)


def test_two_programs_that_store_the_same_byte():
    x, out = torch.zeros(64), torch.empty(64)
    spread[(2,)](x, out, 32, 32)
    with pytest.raises(InterpreterError, match=r"data race on argument 'out': program \(1, 0, 0\) stores"):
        spread[(2,)](x, out, 31, 32)


def test_a_program_that_loads_what_another_stores():
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) loads what another program stores"):
        broadcast[(3,)](torch.zeros(4), 0, 1)
    with pytest.raises(InterpreterError, match=r"program \(2, 0, 0\) stores what another program loads"):
        broadcast[(3,)](torch.zeros(4), 2, 1)


def test_in_place_by_one_program_each_is_no_race_and_neither_are_atomics():
    x = torch.zeros(64)
    spread[(2,)](x, x, 32, 32)
    count[(5,)](x, True, 0)
    assert x[0] == 6 and x[1:].eq(1).all()
    with pytest.raises(InterpreterError, match="data race"):
        count[(5,)](x, False, 0)


def test_each_launch_begins_anew():
    x = torch.zeros(32)
    for _ in range(2):
        spread[(1,)](x, x, 32, 32)
    assert x.eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_without_other(dtype):
    """The lanes before them are used in a sum: NaN comes out where garbage could have."""
    x, out = torch.ones(96), torch.empty(96)
    x = x.to(dtype)

    @triton.jit
    def reversed_sum(x, out, length, OTHER: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        value = tl.load(x + at, mask=at < length, other=0.0) if OTHER else tl.load(x + at, mask=at < length)
        tl.store(out, tl.sum(value.to(tl.float32), 0))

    reversed_sum[(1,)](x, out, 20, True, 32)
    assert out[0] == 20
    reversed_sum[(1,)](x, out, 20, False, 32)
    assert out[0].isnan()


def test_masked_integers_without_other_point_nowhere():
    @triton.jit
    def gather(x, index, out, length, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, tl.load(x + tl.load(index + at, mask=at < length)))

    index, out = torch.arange(32), torch.empty(32)
    gather[(1,)](torch.randn(32), index, out, 32, 32)
    with pytest.raises(InterpreterError, match="out of bounds"):
        gather[(1,)](torch.randn(32), index, out, 31, 32)


def test_device_asserts_are_live():
    promise[(1,)](torch.zeros(1), 1.0)
    with pytest.raises(InterpreterError, match="above the limit"):
        promise[(1,)](torch.ones(1), 1.0)


def test_integer_overflow():
    out = torch.empty(1, dtype=torch.int64)
    overflow[(1,)](out, 40_000)
    with pytest.raises(InterpreterError, match="overflow"):
        overflow[(1,)](out, 50_000)


def test_elements_that_no_program_stores_are_nan():
    out = torch.empty(64)
    half[(1,)](out, 32)
    assert out[:32].eq(1).all() and out[32:].isnan().all()


def test_descriptors_stay_inside_by_themselves():
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def through(source, out, N: tl.constexpr):
        tl.store(out + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], source.load([16, 0]))

    x, out = torch.randn(24, 16), torch.empty(16, 16)
    through[(1,)](TensorDescriptor(x, [24, 16], [16, 1], [16, 16]), out, 16)
    assert torch.equal(out[:8], x[16:]) and out[8:].eq(0).all()


def state():
    from triton.runtime import interpreter

    kind, options = interpreter.InterpreterBuilder, interpreter.interpreter_builder.options
    methods = [value for name, value in sorted(vars(kind).items()) if callable(value)]
    empties = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    return [*methods, interpreter.GridExecutor._init_args_hst, options.debug, *empties]


def test_everything_is_as_before_afterwards():
    before = state()
    with pytest.raises(ZeroDivisionError), sanitize():
        assert state() != before
        raise ZeroDivisionError
    assert state() == before
