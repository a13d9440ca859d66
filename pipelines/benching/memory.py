"""Peak memory of one call, in a pass of its own: a probe inside the timed region would be timed too."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1 << 20
PROCESS = Path("/proc/self")


def peak_mib(call: Callable[[], object], device: torch.device, resident: bool = False) -> float:
    """MiB that were held at most during `call`, beyond what was there before and what it returns; -1 if not known.

    On a GPU by its allocator. On a CPU, where `resident` asks for it and Linux and its C library tell it, by the
    process's resident memory, after all free pages have gone back to the system.
    """
    if device.type == "cuda":
        call()  # what is kept from a first call on (plans, workspaces) was there before
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before - _nbytes(kept)) / MIB
    if not resident or not _give_back() or not _forget_peak():
        return -1.0
    before = _status("VmRSS")
    kept = call()
    return max(_status("VmHWM") - before - _nbytes(kept), 0) / MIB


def _give_back() -> bool:
    """Free pages of the C library to the system; False where it has no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return False
    gc.collect()
    trim(0)
    return True


def _forget_peak() -> bool:
    """Make the present resident memory the process's peak; False where the system has no such thing."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Bytes of a line of the process's status."""
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def _nbytes(kept: object) -> int:
    tensors = kept if isinstance(kept, (tuple, list)) else (kept,)
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
