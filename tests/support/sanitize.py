"""A memory sanitizer for interpreted Triton kernels: `with sanitize(): launch(...)`.

What it finds, as a `MemoryFault` (which the interpreter wraps in its own error, with the same text):

- a load, store or atomic outside the tensors of the launch, or one whose lanes lie in two of them;
- a byte that one program stores and another stores or loads, without an atomic: the order of programs is not defined;
- lanes that a mask leaves out, used without `other=`: they hold NaN, or a huge integer;
- elements that no program stores: `torch.empty` is filled with NaN, or with the largest integer;
- a `tl.device_assert` that fails, and integer overflow (which the interpreter checks by one).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

NOBODY, SEVERAL = -1, -2


class MemoryFault(AssertionError):
    """A kernel touched memory that it must not touch."""


@dataclasses.dataclass
class Span:
    """The bytes of one tensor argument, and which program last stored or loaded each."""

    name: str
    start: int
    size: int

    def __post_init__(self) -> None:
        self.writer = np.full(self.size, NOBODY, dtype=np.int32)
        self.reader = np.full(self.size, NOBODY, dtype=np.int32)

    def off_by(self, address: int) -> int:
        """Bytes from an address to this span; 0 inside."""
        return max(self.start - address, address - (self.start + self.size) + 1, 0)


class Memory:
    """The tensors of the launch that is running."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def begin(self, arguments: dict[str, Any]) -> None:
        """Take the tensors of a launch; views of one storage whose bytes meet are one span."""
        found: dict[tuple[int, int], str] = {}
        for name, value in arguments.items():
            t = getattr(value, "base", value) if type(value).__name__ == "TensorDescriptor" else value
            if isinstance(t, torch.Tensor) and t.numel():
                extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                found.setdefault((t.data_ptr(), t.data_ptr() + extent * t.element_size()), name)
        self.spans = []
        for (start, end), name in sorted(found.items()):
            last = self.spans[-1] if self.spans else None
            if last is not None and start < last.start + last.size:
                size = max(last.size, end - last.start)
                self.spans[-1] = Span(f"{last.name}, {name}", last.start, size)
            else:
                self.spans.append(Span(name, start, end - start))

    def touch(self, addresses: np.ndarray, item: int, program: tuple[int, ...], number: int, what: str) -> None:
        """Check one access of `item` bytes at each address, and note it unless it is an atomic."""
        if not addresses.size or not self.spans:
            return
        first = int(addresses[0])
        span = min(self.spans, key=lambda s: s.off_by(first))
        at = addresses.astype(np.int64) - span.start
        outside = (at < 0) | (at + item > span.size)
        if outside.any():
            wrong = int(at[outside][0])
            beyond = wrong if wrong < 0 else wrong + item - span.size
            raise MemoryFault(
                f"{what} out of bounds in program {program}: {int(outside.sum())} of {at.size} lanes, off by {beyond} "
                f"bytes from argument '{span.name}'"
            )
        if what != "atomic":
            self._note(span, (at[:, None] + np.arange(item)).ravel(), program, number, what)

    def _note(self, span: Span, at: np.ndarray, program: tuple[int, ...], number: int, what: str) -> None:
        others = [("stores", span.writer)] + ([("loads", span.reader)] if what == "store" else [])
        for does, owner in others:
            mine = owner[at]
            if ((mine != NOBODY) & (mine != number)).any():
                raise MemoryFault(
                    f"data race on argument '{span.name}': program {program} {what}s what another program {does}"
                )
        if what == "store":
            span.writer[at] = number
        else:
            before = span.reader[at]
            span.reader[at] = np.where((before == NOBODY) | (before == number), number, SEVERAL)


@contextlib.contextmanager
def sanitize() -> Iterator[None]:
    """Check every interpreted launch inside the block. Not reentrant; needs TRITON_INTERPRET=1."""
    from triton.runtime import interpreter

    builder, kind = interpreter.interpreter_builder, interpreter.InterpreterBuilder
    executor = interpreter.GridExecutor
    memory = Memory()
    original = {
        name: getattr(kind, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }
    prepare, options = executor._init_args_hst, builder.options

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        host, named = prepare(self, args, kwargs)
        memory.begin({**dict(zip(self.arg_names, host, strict=False)), **named})
        return host, named

    def touch(pointers: Any, mask: Any, what: str) -> None:
        addresses = pointers.data
        if mask is not None:
            addresses, live = np.broadcast_arrays(addresses, np.asarray(mask.data, dtype=bool))
            addresses = addresses[live]
        item = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        _, rows, columns = builder.grid_dim
        x, y, z = program = tuple(builder.grid_idx)
        memory.touch(np.ravel(addresses), item, program, (x * rows + y) * columns + z, what)

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        touch(pointers, mask, "load")
        result = original["create_masked_load"](self, pointers, mask, other, *rest, **named)
        return result if other is not None else _poisoned(result, mask)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(pointers, mask, "store")
        return original["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(pointers, mask, "atomic")
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        touch(pointers, None, "atomic")
        return original["create_atomic_cas"](self, pointers, *rest)

    checked = {
        "create_masked_load": load, "create_masked_store": store,
        "create_atomic_rmw": atomic_rmw, "create_atomic_cas": atomic_cas,
    }  # fmt: skip
    for name, method in checked.items():
        setattr(kind, name, method)
    executor._init_args_hst = init_args
    builder.options = dataclasses.replace(options, debug=True)  # device_assert and overflow checks go by it
    try:
        with _filled_empties():
            yield
    finally:
        for name, method in original.items():
            setattr(kind, name, method)
        executor._init_args_hst, builder.options = prepare, options


def _poisoned(result: Any, mask: Any) -> Any:
    """The lanes that the mask leaves out as NaN or a huge integer; a bool has no such value."""
    live = np.broadcast_to(np.asarray(mask.data, dtype=bool), result.data.shape)
    bits, kind = result.data.dtype, result.dtype.scalar
    if live.all() or bits.kind not in "fiu":
        return result
    if bits.kind == "f":
        bad = bits.type(np.nan)
    elif kind.name == "bf16":
        bad = bits.type(0x7FC0)
    else:
        bad = bits.type(np.iinfo(bits).max // 2)
    return type(result)(np.where(live, result.data, bad), kind)


@contextlib.contextmanager
def _filled_empties() -> Iterator[None]:
    """torch.empty gives NaN or the largest integer, through PyTorch's own switch; operators only warn, if at all."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
