"""The columns of a result, and the figures that follow from its times."""

from __future__ import annotations

from collections.abc import Mapping

from attn_plugins.pipelines.benching import results
from attn_plugins.pipelines.benching.results import Row

KEY = ("case", "dtype", "head_dim", "direction", "side")
COLUMNS = (
    "suite", "case", "shape", "option", "tokens", "batch", "heads", "kv_heads", "head_dim", "dtype", "direction",
    "side", "role", "density", "work", "ms", "p20_ms", "p80_ms", "rounds", "index_ms", "baseline", "baseline_ms",
    "speedup", "share", "share_one_call", "share_of_work", "pass", "aim", "extra_mib", "qkv_mib", "error", "allowed",
    "note", "sm_mhz_before", "memory_mhz_before", "power_w_before", "temperature_c_before", "sm_mhz_after",
    "memory_mhz_after", "power_w_after", "temperature_c_after", "gpu", "driver", "cuda", "torch", "triton", "natten",
    "python", "commit",
)  # fmt: skip


def derived(row: Mapping[str, object], baseline: str, baseline_ms: float) -> Row:
    """Speed-up over the fastest dense side, and the shares of ideal; -1 where a number for it is missing.

    share: density x dense time / time, the density being that of the blocks which this side visits. share_one_call:
    the same with the making of the index in the time. share_of_work: with the density of the mask itself, which no
    tiling can beat.
    """
    ms, index, density, work = (float(str(row[name])) for name in ("ms", "index_ms", "density", "work"))
    speedup = baseline_ms / ms if ms > 0 and baseline_ms > 0 else -1.0
    one_call = baseline_ms / (ms + index) if speedup > 0 and index >= 0 else -1.0
    return {
        "baseline": baseline,
        "baseline_ms": baseline_ms,
        "speedup": speedup,
        "share": density * speedup if speedup > 0 and density >= 0 else -1.0,
        "share_one_call": density * one_call if one_call > 0 and density >= 0 else -1.0,
        "share_of_work": work * speedup if speedup > 0 else -1.0,
    }


def rounded(row: Mapping[str, object]) -> Row:
    """In the order of COLUMNS, numbers to five digits, -1 for what is missing: never a blank."""
    return results.rounded(row, COLUMNS)
