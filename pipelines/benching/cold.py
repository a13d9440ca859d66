"""What a first call costs beyond the others: making the plan, uploading it, inverting its lists."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch


def forget_plans() -> None:
    """Empty every cache of tables and plans in the library, so that the next call makes its own."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "attn_plugins" and name.split(".")[1:2] != ["registry"]:
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)) and hasattr(value, "cache_info"):
                    value.cache_clear()


def wall_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
