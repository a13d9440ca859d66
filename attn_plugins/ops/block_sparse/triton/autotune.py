"""Measure which configs are fastest for a problem on this GPU, and let them stand in their rows' places."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from attn_plugins.ops.block_sparse.triton import configs, launch
from attn_plugins.ops.block_sparse.triton.configs import Config
from attn_plugins.ops.target import triton_target
from attn_plugins.plan.block_plan import BlockPlan

Measure = Callable[[Callable[[], object]], float]


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    from triton.testing import do_bench

    return do_bench(run, quantiles=[0.5])


def autotune(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float = 0.1,
    kernels: Iterable[str] = configs.KERNELS,
    candidates: Iterable[Config] | None = None,
    measure: Measure = milliseconds,
) -> dict[str, tuple[Config, float]]:
    """Kernel -> (fastest config, milliseconds); from then on it is used for this precision and head size.

    q (B, H, N, D), k and v (B, H_kv, N_kv, D). The backward kernels are timed in a whole backward. Configs that do not
    fit the GPU are passed over; the one in use is always among those tried. `configs.set_override(..., None)` takes a
    choice back.

    Raises:
        RuntimeError: no GPU, or no config that fits it.
    """
    target = triton_target()
    if target is None or (target == "interpreter" and measure is milliseconds):
        raise RuntimeError("autotune measures kernels on a GPU, and there is none here: configs.TABLE stays as it is")
    out, lse = launch.forward(q, k, v, plan, scale)
    found = {}
    for kernel in kernels:
        used = launch.config_of(kernel, q, plan)
        tried = configs.candidates(kernel, q.dtype, q.shape[-1]) if candidates is None else candidates
        best: tuple[Config, float] | None = None
        for config in dict.fromkeys((used, *tried)):
            time = _time(kernel, config, q, k, v, out, lse, plan, scale, measure)
            if time is not None and (best is None or time < best[1]):
                best = config, time
        if best is None:
            raise RuntimeError(f"no config of {kernel} fits {target}: give smaller candidates")
        configs.set_override(kernel, target, q.dtype, q.shape[-1], best[0])
        found[kernel] = best
    return found


def _time(kernel, config, q, k, v, out, lse, plan, scale, measure):  # type: ignore[no-untyped-def]
    """Milliseconds, or None where the GPU has too little shared memory for the config, or too few registers."""
    from triton.runtime.errors import OutOfResources

    def run() -> object:
        if kernel == "forward":
            return launch.forward(q, k, v, plan, scale, config)
        chosen = {"config_q" if kernel == "grad_q" else "config_kv": config}
        return launch.backward(out, None, q, k, v, out, lse, plan, scale, **chosen)

    try:
        return measure(run)
    except OutOfResources:
        return None
