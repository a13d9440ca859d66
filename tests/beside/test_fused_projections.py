"""Fused q, k, v: new families fuse inside their modules, older ones get other processors."""

from __future__ import annotations

import functools

import pytest

from tests.support.beside import check_beside
from tests.support.tiny_models import MODELS, forward

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.mark.parametrize("family", ["sd15", "sd3", "cogvideox", "hunyuan_video", "pixart", "flux", "wan", "qwen_image"])
def test_fused_projections(family: str) -> None:
    tiny = MODELS[family]
    # of SD 3.5, diffusers cannot run what it has fused: its second attention gets no text
    build = functools.partial(tiny.build, dual=False) if family == "sd3" else tiny.build
    check_beside(
        build,
        functools.partial(forward, inputs=tiny.inputs(1, 0)),
        lambda model: model.fuse_qkv_projections(),
        lambda model: model.unfuse_qkv_projections(),
    )
