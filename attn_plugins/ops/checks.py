"""What every operator checks before it runs, and which backend runs it."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.ops.target import kernels_run_on
from attn_plugins.sequence import Sequence, text_lengths

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "reference", "cpu", "triton")
INTEGERS = (torch.int32, torch.int64)  # of tensors that hold lengths and places
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_HEAD_DIM = 256  # the largest


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q (B, H, N, D); k and v (B, H_kv, N_kv, D) with H a multiple of H_kv; one floating dtype, one device.

    Raises:
        ValueError: another number of dimensions, sizes that do not agree, or different devices.
        TypeError: different or non-floating dtypes.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{shapes}: q, k and v are (batch, heads, tokens, head_dim), as in SDPA")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: k and v have one shape, and share batch and head_dim with q")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} KV heads")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        legal = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one floating dtype: {legal}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one device")


def kernel_refusal(q: torch.Tensor) -> str:
    """Why Triton kernels cannot take a tensor (B, H, N, D), whatever the device; "" if they can."""
    if q.dtype not in KERNEL_DTYPES:
        return f"the kernels compute in {', '.join(str(dtype)[6:] for dtype in KERNEL_DTYPES)}, not {str(q.dtype)[6:]}"
    if q.shape[-1] > KERNEL_HEAD_DIM:
        return f"the kernels take head sizes of up to {KERNEL_HEAD_DIM}, not {q.shape[-1]}"
    return ""


def check_sequence(q: torch.Tensor, k: torch.Tensor, grid: Any, text_before: Any, text_after: Any) -> Sequence:
    """What the tokens of q and k are, from the options of an operator on a grid.

    Raises:
        ValueError, TypeError: an illegal grid or text, or tensors of another length or batch.
    """
    before, valid_before = text_lengths("text_before", text_before)
    after, valid_after = text_lengths("text_after", text_after)
    sequence = Sequence(grid, before, after, valid_before, valid_after)
    if not q.shape[2] == k.shape[2] == sequence.length:
        raise ValueError(
            f"q has {q.shape[2]} tokens, k {k.shape[2]}; text_before {before} + grid {sequence.grid} "
            f"({sequence.tokens}) + text_after {after} makes {sequence.length}"
        )
    for valid in (valid_before, valid_after):  # here, not in Sequence: it makes one int of rows that are all alike
        if isinstance(valid, tuple) and len(valid) != q.shape[0]:
            raise ValueError(f"valid text lengths for {len(valid)} batch items, but the batch has {q.shape[0]}")
    return sequence


def choose_backend(backend: str, device: torch.device, kernels: bool = False, refusal: str = "") -> str:
    """The backend that runs: "auto" is Triton on CUDA and ROCm devices if it is there, else "cpu", which runs anywhere.

    `kernels`: the operator has Triton kernels; `refusal`: why they cannot take this call (`kernel_refusal`).

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: legal are {', '.join(BACKENDS)}")
    if backend == "triton":
        if not kernels or refusal:
            reason = refusal or "this operator has no Triton kernel for this call"
            raise ValueError(f"backend='triton': {reason}; use 'auto' or 'cpu'")
        if not kernels_run_on(device):
            raise ValueError(f"backend='triton': Triton does not run on {device} here; use 'auto' or 'cpu'")
        return "triton"
    if backend == "auto":
        return "triton" if kernels and not refusal and device.type == "cuda" and kernels_run_on(device) else "cpu"
    return backend


def runs_plainly(*tensors: torch.Tensor) -> bool:
    """Whether nothing but a result is wanted of a call: no gradient, no graph, no mode or subclass that looks on.

    An operator may then call its backend itself: the way through `torch.library` takes a tenth of a millisecond, which
    is as long as a decoding step reads a megabyte.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(type(t) is torch.Tensor or type(t) is torch.nn.Parameter for t in tensors)


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """None is head_dim ** -0.5; 0.0 is 0.0."""
    return head_dim**-0.5 if scale is None else float(scale)
