"""The columns of the benchmark's file, and the figures that follow from its times."""

from __future__ import annotations

from attn_plugins.pipelines.benching.contest import Contest, Outcome
from attn_plugins.pipelines.benching.flops import gflop
from attn_plugins.pipelines.benching.masks.mask import Mask
from attn_plugins.pipelines.benching.results import Row
from attn_plugins.pipelines.benching.sides import DTYPE_NAMES, Setting

KEY = (
    "mask", "tokens", "batch", "heads", "kv_heads", "head_dim", "dtype", "direction", "backend", "machine", "threads",
)  # fmt: skip
COLUMNS = (
    "mask", "option", "tokens", "batch", "heads", "kv_heads", "head_dim", "dtype", "direction", "backend", "density",
    "executed", "useful_gflop", "executed_gflop", "ms", "p20_ms", "p80_ms", "rounds", "useful_gflops", "baseline",
    "baseline_ms", "speedup", "share", "index_ms", "extra_mib", "error", "allowed", "reason", "sm_mhz_before",
    "memory_mhz_before", "power_w_before", "temperature_c_before", "sm_mhz_after", "memory_mhz_after", "power_w_after",
    "temperature_c_after", "machine", "threads", "driver", "cuda", "torch", "triton", "natten", "flash_attn", "python",
    "commit",
)  # fmt: skip


def row(mask: Mask, setting: Setting, one: Outcome, held: Contest, direction: str) -> Row:
    """One backend in one direction.

    density: share of all pairs that the mask needs. executed: share that the backend's tiles visit, -1 where it does
    not say. useful_gflops: useful_gflop a second. baseline: the fastest dense kernel, causal where the mask is, which
    computes all pairs. share: of the speed-up over it that the mask's pairs alone would allow.
    """
    taken, n = one.time(direction), mask.shape.tokens
    useful = gflop(mask.pairs, mask.shape, setting.head_dim, direction)
    executed = gflop(one.density * n * n, mask.shape, setting.head_dim, direction)
    baseline, baseline_ms = held.baseline(direction)
    dense = (n + 1) / (2 * n) if mask.causal else 1.0
    speedup = baseline_ms / taken.ms if taken.ms > 0 and baseline_ms > 0 else -1.0
    error, allowed = one.verdict.worst[1:] if one.verdict else (-1.0, -1.0)
    return about(mask, setting, direction, one.side.name) | held.readings | {
        "executed": one.density, "useful_gflop": useful, "executed_gflop": executed, "ms": taken.ms,
        "p20_ms": taken.low, "p80_ms": taken.high, "rounds": taken.rounds,
        "useful_gflops": 1e3 * useful / taken.ms if taken.ms > 0 else -1.0,
        "baseline": baseline, "baseline_ms": baseline_ms, "speedup": speedup,
        "share": speedup * mask.density / dense if speedup > 0 else -1.0,
        "index_ms": one.index_ms, "extra_mib": one.extra_mib, "error": error, "allowed": allowed, "reason": one.note,
    }  # fmt: skip


def about(mask: Mask, setting: Setting, direction: str, backend: str) -> Row:
    """What a row measures, without `mask`, its name."""
    shape = mask.shape
    return {
        "option": mask.option, "density": mask.density, "tokens": shape.tokens, "batch": shape.batch,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": setting.head_dim,
        "dtype": DTYPE_NAMES[setting.dtype], "direction": direction, "backend": backend,
    }  # fmt: skip
