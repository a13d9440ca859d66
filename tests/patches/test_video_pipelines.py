"""Whole video pipelines end to end: pictures, clips and references to begin from, guidance, batches, schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.sequence import Sequence
from tests.support.tiny_video_pipelines import VIDEO_PIPELINES, build, clip, run
from tests.support.windowed import Recording, brute_force, shrunk

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
GNA: dict[str, Any] = {"stride": 1, "min_tokens": 0, "dense_steps": 0, "strict": True}
NAMES = sorted(VIDEO_PIPELINES)


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


def test_a_full_window_is_the_dense_pipeline(named: Any) -> None:
    name, pipe, dense = named
    with attn_plugins.patched(pipe, "gna", window=-1, **GNA) as handle:
        full = run(name, pipe)
        assert handle.patches[0].state.last_sequence.grid == VIDEO_PIPELINES[name].grid
    torch.testing.assert_close(full, dense, atol=2e-5, rtol=1e-4)
    assert torch.equal(run(name, pipe), dense)


def test_a_small_window_is_what_brute_force_says(named: Any) -> None:
    name, pipe, dense = named
    handle = attn_plugins.patch(pipe, "gna", window=2, **GNA)
    recordings = [Recording(layer.processor) for layer in handle.patches[0].layers]
    for layer, recording in zip(handle.patches[0].layers, recordings, strict=True):
        layer.processor = recording
    sparse = run(name, pipe)
    assert torch.isfinite(sparse).all()
    assert not torch.allclose(sparse, dense, atol=1e-4)
    for recording in recordings:
        assert recording.calls
        for call, out in recording.calls[-2:]:
            expected = brute_force(call, shrunk(call.sequence, 2), (1,) * len(call.sequence.grid))
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    handle.remove()
    assert torch.equal(run(name, pipe), dense)


def test_a_batch_of_prompts_gives_what_each_gives(named: Any) -> None:
    name, pipe, _ = named
    if not VIDEO_PIPELINES[name].batches:
        with pytest.raises((ValueError, RuntimeError)):  # diffusers' own refusal: this line goes when they take them
            run(name, pipe, items=2)
        return
    with attn_plugins.patched(pipe, "gna", window=2, **GNA):
        both, first = run(name, pipe, items=2), run(name, pipe)
    torch.testing.assert_close(both[:1], first, atol=2e-5, rtol=1e-4)


def test_steps_are_counted_by_the_schedule(named: Any) -> None:
    """However many calls a step takes: guidance, perturbed guidance, two modalities."""
    name, pipe, _ = named
    handle = attn_plugins.patch(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.5})
    state, root, seen = handle.patches[0].state, handle.roots[0], []
    enter = state.enter

    def watched(sequence: Any, dense: bool, *rest: Any) -> None:
        seen.append(dense)
        enter(sequence, dense, *rest)

    state.enter = watched  # type: ignore[method-assign]
    run(name, pipe, steps=4)
    handle.remove()
    assert root is (pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    begun_in_the_middle = name == "wan_video_to_video"
    assert seen == sorted(seen, reverse=True)  # dense first
    assert seen.count(True) == (0 if begun_in_the_middle else len(seen) // 2)


@pytest.mark.parametrize(
    ("size", "grid"), [({"num_frames": 5}, (2, 3, 4)), ({"num_frames": 1}, (1, 3, 4)), ({"height": 64}, (3, 4, 4))]
)
def test_other_sizes_in_one_patch(size: dict[str, int], grid: tuple[int, ...]) -> None:
    pipe = build("wan_image_to_video")
    dense = run("wan_image_to_video", pipe, **size)
    with attn_plugins.patched(pipe, "gna", window=-1, **GNA) as handle:
        run("wan_image_to_video", pipe)
        torch.testing.assert_close(run("wan_image_to_video", pipe, **size), dense, atol=2e-5, rtol=1e-4)
        assert handle.patches[0].state.last_sequence.grid == grid


def test_wan_vace_with_and_without_references() -> None:
    pipe = build("wan_vace")
    with attn_plugins.patched(pipe, "gna", window=2, **GNA) as handle:
        state = handle.patches[0].state
        run("wan_vace", pipe)
        assert state.last_sequence == Sequence((3, 3, 4), text_before=12)
        run("wan_vace", pipe, reference_images=None)
        assert state.last_sequence == Sequence((3, 3, 4))
        run("wan_vace", pipe, video=None, mask=None, reference_images=clip(2))
        assert state.last_sequence == Sequence((3, 3, 4), text_before=24)


def test_ltx_with_and_without_keyframes() -> None:
    pipe = build("ltx_condition")
    with attn_plugins.patched(pipe, "gna", window=2, **GNA) as handle:
        state = handle.patches[0].state
        run("ltx_condition", pipe)
        assert state.last_sequence == Sequence((3, 8, 8), text_before=64)
        run("ltx_condition", pipe, conditions=None)
        assert state.last_sequence == Sequence((3, 8, 8))


@pytest.mark.parametrize(("steps", "dense_calls"), [(1, 0), (4, 2)])
def test_few_step_schedules(steps: int, dense_calls: int) -> None:
    """Of distilled models: a quarter of one step is none, of four steps it is one, which has two calls here."""
    name = "wan_image_to_video"
    pipe = build(name)
    handle = attn_plugins.patch(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.25})
    recording = handle.patches[0].layers[0].processor = Recording(handle.patches[0].layers[0].processor)
    run(name, pipe, steps=steps)
    assert len(recording.calls) == 2 * steps - dense_calls
