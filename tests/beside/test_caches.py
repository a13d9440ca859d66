"""diffusers' caches: they skip attention or blocks, hooked above or below us, and go in any order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.beside import check_beside
from tests.support.tiny_pipelines import build, run

diffusers = pytest.importorskip("diffusers", "0.38", reason="TaylorSeerCacheConfig")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def pyramid(pipe: Any) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep,
    )  # fmt: skip


def faster(pipe: Any) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep, attention_weight_callback=lambda _: 0.3,
        unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(-1, 1001), tensor_format="BFCHW",
    )  # fmt: skip


def first_block(pipe: Any) -> Any:
    return diffusers.FirstBlockCacheConfig(threshold=1e3)


def taylor(pipe: Any) -> Any:
    import torch

    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
    )


CACHES = {"pyramid": pyramid, "faster": faster, "first_block": first_block, "taylor": taylor}
PAIRS = [
    ("pyramid", "cogvideox"),
    ("pyramid", "wan"),
    ("faster", "cogvideox"),
    ("first_block", "flux"),
    ("first_block", "wan"),
    ("taylor", "flux"),
]


@pytest.mark.parametrize(("cache", "name"), PAIRS)
def test_caches(cache: str, name: str) -> None:
    check_beside(
        lambda: build(name),
        lambda pipe: run(name, pipe, steps=4),
        lambda pipe: pipe.transformer.enable_cache(CACHES[cache](pipe)),
        lambda pipe: pipe.transformer.disable_cache(),
        changes=True,
    )
