"""Whole pipelines with random weights, end to end: text encoders, schedulers, guidance, batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support import tiny_pipelines
from tests.support.snapshot import snapshot
from tests.support.tiny_pipelines import PIPELINES, build, run
from tests.support.windowed import Recording, brute_force, shrunk

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
NAMES = sorted(PIPELINES)
GNA: dict[str, Any] = {"stride": 1, "min_tokens": 0, "dense_steps": 0}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """Built once: every test leaves its pipeline as it was, which is what is tested."""
    return {}


@pytest.fixture(params=NAMES)
def named(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> tuple[str, Any, torch.Tensor]:
    """(name, pipeline, its dense output)."""
    name = request.param
    if name not in pipes:
        pipe = build(name)
        pipes[name] = pipe, run(name, pipe)
    return name, *pipes[name]


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def test_a_full_window_is_the_dense_pipeline(named: Any) -> None:
    name, pipe, dense = named
    with attn_plugins.patched(pipe, "gna", window=-1, **GNA) as handle:
        full = run(name, pipe)
        assert handle.patches[0].state.last_sequence.grid == PIPELINES[name].grid
    torch.testing.assert_close(full, dense, atol=2e-5, rtol=1e-4)
    assert torch.equal(run(name, pipe), dense)


def test_a_small_window_is_what_brute_force_says(named: Any) -> None:
    name, pipe, dense = named
    handle = attn_plugins.patch(pipe, "gna", window=2, **GNA)
    recordings = []
    for layer in handle.patches[0].layers:
        layer.processor = Recording(layer.processor)
        recordings.append(layer.processor)
    sparse = run(name, pipe)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert any(call.sequence.grid == PIPELINES[name].grid for row in recordings for call, _ in row.calls)
    for recording in recordings:
        for call, out in recording.calls[-2:]:
            expected = brute_force(call, shrunk(call.sequence, 2), (1,) * len(call.sequence.grid))
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    attn_plugins.unpatch(pipe)
    assert torch.equal(run(name, pipe), dense)


def test_the_denoiser_is_patched_and_nothing_else_is(named: Any) -> None:
    _, pipe, _ = named
    others = {
        key: (part, snapshot(part))
        for key, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and part is not denoiser(pipe)
    }
    before = snapshot(denoiser(pipe))
    handle = attn_plugins.patch(pipe, "gna", window=2, **GNA)
    assert handle.roots == [denoiser(pipe)]
    for key, (part, state) in others.items():
        assert snapshot(part) == state, key
    handle.remove()
    assert snapshot(denoiser(pipe)) == before


def test_dense_steps_are_dense_and_the_rest_is_not(named: Any) -> None:
    name, pipe, dense = named
    with attn_plugins.patched(pipe, "gna", window=2, **{**GNA, "dense_steps": 1.0}):
        assert torch.equal(run(name, pipe), dense)
    with attn_plugins.patched(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.5}) as handle:
        layer = handle.patches[0].layers[0]
        layer.processor = recording = Recording(layer.processor)
        forwards: list[int] = []
        counter = denoiser(pipe).register_forward_hook(lambda *_: forwards.append(1))
        for steps in (2, 4, 2):
            recording.calls.clear()
            forwards.clear()
            half = run(name, pipe, steps=steps)
            assert len(recording.calls) == len(forwards) // 2 > 0  # guidance may take two forwards a step
        counter.remove()
        assert not torch.equal(half, dense)


def test_prompts_of_different_lengths_in_one_batch() -> None:
    """HunyuanVideo pads prompts: each item must come out as it does alone, and as dense attention makes it."""
    name, prompts = "hunyuan_video", ["a", "an astronaut riding a horse"]
    pipe = build(name)
    noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    dense = run(name, pipe, prompt=prompts, latents=noise)
    with attn_plugins.patched(pipe, "gna", window=-1, **GNA) as handle:
        full = run(name, pipe, prompt=prompts, latents=noise)
        valid = handle.patches[0].state.last_sequence.valid_after
        assert isinstance(valid, tuple) and len(set(valid)) == 2
    torch.testing.assert_close(full, dense, atol=2e-5, rtol=1e-4)
    with attn_plugins.patched(pipe, "gna", window=2, **GNA):
        both = run(name, pipe, prompt=prompts, latents=noise)
        for index, prompt in enumerate(prompts):
            alone = run(name, pipe, prompt=prompt, latents=noise[index : index + 1])
            torch.testing.assert_close(both[index : index + 1], alone, atol=2e-5, rtol=1e-4)


def test_both_transformers_of_wan_2_2() -> None:
    """The two share a schedule: with half of the steps dense, the second one never runs dense."""
    from diffusers import WanPipeline

    base = build("wan")
    second = tiny_pipelines.tiny_models.wan()
    pipe = WanPipeline(**{**base.components, "transformer_2": second}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    dense = run("wan", pipe, steps=4)
    handle = attn_plugins.patch(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.5})
    assert handle.roots == [pipe.transformer, pipe.transformer_2]
    seen: dict[str, list[bool]] = {"transformer": [], "transformer_2": []}
    for key, patched in zip(seen, handle.patches, strict=True):
        state = patched.state
        state.enter = _spy(state.enter, seen[key])  # type: ignore[method-assign]
    assert not torch.equal(run("wan", pipe, steps=4), dense)
    assert seen["transformer"] and seen["transformer_2"]
    assert seen["transformer"] + seen["transformer_2"] == [True] * 4 + [False] * 4  # two calls a step
    handle.remove()
    assert torch.equal(run("wan", pipe, steps=4), dense)


def _spy(enter: Any, seen: list[bool]) -> Any:
    def spying(sequence: Any, dense: bool, *rest: Any) -> None:
        seen.append(dense)
        enter(sequence, dense, *rest)

    return spying


def test_two_pipelines_at_once() -> None:
    one, two = build("flux"), build("flux")
    dense = run("flux", one)
    attn_plugins.patch(one, "gna", window=2, **GNA)
    assert torch.equal(run("flux", two), dense)
    attn_plugins.patch(two, "gna", window=4, **GNA)
    first, second = run("flux", one), run("flux", two)
    assert not torch.equal(first, second)
    attn_plugins.unpatch(one)
    assert torch.equal(run("flux", one), dense)
    assert torch.equal(run("flux", two), second)


def test_pipelines_that_share_a_transformer_share_its_patch() -> None:
    from diffusers import FluxPipeline

    one = build("flux")
    two = FluxPipeline(**one.components)
    two.set_progress_bar_config(disable=True)
    handle = attn_plugins.patch(one, "gna", window=2, **GNA)
    assert attn_plugins.patch(two, "gna", window=2, **GNA) is handle
    assert torch.equal(run("flux", one), run("flux", two))
    attn_plugins.unpatch(two)
    assert not handle.active


def test_a_copied_pipeline_can_be_unpatched_on_its_own() -> None:
    pipe = build("sd15")
    dense = run("sd15", pipe)
    attn_plugins.patch(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.5})
    sparse = run("sd15", pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run("sd15", twin), sparse)
    attn_plugins.unpatch(twin)
    assert torch.equal(run("sd15", twin), dense)
    assert torch.equal(run("sd15", pipe), sparse)


def test_cpu_offload_with_hooks() -> None:
    from accelerate import cpu_offload

    pipe = build("wan")
    dense = run("wan", pipe)
    attn_plugins.patch(pipe, "gna", window=2, **GNA)
    sparse = run("wan", pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    torch.testing.assert_close(run("wan", pipe), sparse)
    attn_plugins.unpatch(pipe)
    torch.testing.assert_close(run("wan", pipe), dense)
