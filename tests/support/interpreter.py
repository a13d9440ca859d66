"""Triton's interpreter (TRITON_INTERPRET=1), with bfloat16 repaired.

The interpreter keeps bfloat16 as uint16 and computes on the bits: a `tl.dot` of bfloat16 is wrong by 8e+08, in silence.
`repair_interpreter` lets every operation of the builder widen such operands to float32 and round its result once, as
hardware does. Reductions and sorts read the bits past the builder: kernels reduce in float32.

The switch is read when `@triton.jit` decorates, so it must be set before a kernel is imported: tests/conftest.py does,
where there is no GPU. What compiles runs in a process without it (tests/support/offline.py).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

# Builder methods, and the operand whose type their result takes.
LIFTED = {"create_dot": 2, "binary_op": 0, "unary_op": 0, "create_fma": 2, "create_clampf": 0}


def interpreting() -> bool:
    """Whether kernels imported from now on are interpreted."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


@functools.cache
def repair_interpreter() -> None:
    """Repair the interpreter of this process, once. Imports triton."""
    _repair_bfloat16()
    _repair_index()


def _repair_index() -> None:
    """Triton 3.6 makes an int of a one-element array, as for the end of a `range`; NumPy 2.4 no longer allows that."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _repair_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bfloat16(value: Any) -> bool:
        return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16

    def wide(value: Any) -> Any:
        return TensorHandle(widen(value.data), tl.float32) if is_bfloat16(value) else value

    def rounded(value: Any) -> Any:
        if value.data.dtype == np.bool_:  # a comparison
            return TensorHandle(value.data, tl.int1)
        return TensorHandle(narrow(value.data), tl.bfloat16)

    def lifted(method: Any, typed: int) -> Any:
        def repaired(self: Any, *operands: Any) -> Any:
            if not any(map(is_bfloat16, operands)):
                return method(self, *operands)
            result = method(self, *map(wide, operands))
            return rounded(result) if is_bfloat16(operands[typed]) else result

        return repaired

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16:
            return source if is_bfloat16(source) else rounded(cast(self, source, tl.float32))
        return cast(self, wide(source), kind)

    InterpreterBuilder.cast_impl = cast_impl
    for name, typed in LIFTED.items():
        setattr(InterpreterBuilder, name, lifted(getattr(InterpreterBuilder, name), typed))
