"""Peak memory of one call, in a pass of its own: a probe inside the timed region would be timed too."""

from __future__ import annotations

from collections.abc import Callable

import torch

MIB = 1 << 20


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """MiB that were allocated at most during `call`, beyond what was there before and what it returns; -1 on a CPU."""
    if device.type != "cuda":
        return -1.0
    call()  # what is kept from a first call on (plans, workspaces) was there before
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before - _nbytes(kept)) / MIB


def _nbytes(kept: object) -> int:
    tensors = kept if isinstance(kept, (tuple, list)) else (kept,)
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
