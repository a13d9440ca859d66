"""What the Triton kernels run on, asked in this one place.

Triton's active driver answers: a test that activates a driver of its own moves every launcher along with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from contextlib import AbstractContextManager

import torch

# Of every launch. Left out, Triton's version decides whether a product and a sum are one instruction, rounded once (up
# to 3.9, which warns), or two (announced for 3.10), or an environment variable does: other bits from the same kernel.
OPTIONS = {"enable_fp_fusion": True}


def triton_target() -> str | None:
    """ "sm_90", "gfx942", ...; "interpreter" where kernels are interpreted; None where nothing can run a kernel."""
    if not _has_triton():
        return None
    import triton
    from triton.runtime import driver

    if triton.knobs.runtime.interpret:
        return "interpreter"
    try:
        target = driver.active.get_current_target()
    except RuntimeError:  # no driver, or several
        return None
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@torch.compiler.assume_constant_result
def kernels_run_on(device: torch.device) -> bool:
    """Whether a Triton kernel can be launched on tensors of this device."""
    target = triton_target()
    if target is None or target == "interpreter":
        return target is not None
    from triton.runtime import driver

    return driver.active.get_active_torch_device().type == device.type


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches there, not where its tensors are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _has_triton() -> bool:
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # a bare folder of that name has no origin
