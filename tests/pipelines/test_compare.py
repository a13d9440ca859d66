"""compare on a real tiny pipeline: what it measures, that it leaves no trace, and what it refuses."""

import csv
import dataclasses
import math

import pytest
import torch

import attn_plugins
from attn_plugins.metrics import drift
from attn_plugins.pipelines.compare import as_frames, compare
from attn_plugins.pipelines.comparing import measure_files, pictures
from attn_plugins.record import patches_of
from tests.support import tiny_pipelines

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
STEPS = 4
SETTING = dict(window=(3, 4, 2), stride=(1, 1, 2), dense_steps=0.5)
CALL = dict(prompt="a cat", height=64, width=64, num_frames=9, max_sequence_length=16, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.build("wan")


@pytest.fixture(scope="module")
def found(pipe):
    return compare(pipe, "gna", call_kwargs=CALL, seeds=(0, 1), options=SETTING, measure_rows=16)


def latents_per_step(pipe, seed):
    rows = []

    def keep(_pipe, _step, _timestep, state):
        rows.append(state["latents"].clone())
        return {}

    pipe(**CALL, generator=torch.Generator().manual_seed(seed), callback_on_step_end=keep, output_type="latent")
    return rows


def test_counts(found):
    assert (found.model, found.method, found.steps, found.dense_steps) == ("WanPipeline", "gna", STEPS, 2)
    assert found.seeds == (0, 1) and len(found.frames) == 2
    assert found.sparse_share == 0.5


def test_drift_is_that_of_the_latents(pipe, found):
    expected = []
    for seed in found.seeds:
        dense = latents_per_step(pipe, seed)
        with attn_plugins.patched(pipe, "gna", **SETTING):
            moved = latents_per_step(pipe, seed)
        expected.append([drift(a, b).relative_l2 for a, b in zip(moved, dense, strict=True)])
    means = [sum(column) / len(column) for column in zip(*expected, strict=True)]
    assert [row.relative_l2 for row in found.likeness.drift] == pytest.approx(means)
    assert means[0] == means[1] == 0 < means[2], "the first half of the steps is dense, and the setting is sparse"


def test_noise_floor_is_zero_where_the_machine_is_deterministic(found):
    assert all(row.relative_l2 == 0 for row in found.noise.drift)
    assert found.noise.psnr == math.inf and found.noise.ssim == pytest.approx(1)
    assert found.likeness.psnr < 100 and found.likeness.ssim < 1


def test_latent_psnr_is_over_the_dense_range_and_its_floor_is_bit_identical(pipe, found):
    values = []
    for seed in found.seeds:
        dense = latents_per_step(pipe, seed)
        with attn_plugins.patched(pipe, "gna", **SETTING):
            moved = latents_per_step(pipe, seed)
        errors = [(a.double() - b.double()).square().mean() for a, b in zip(moved, dense, strict=True)]
        ranges = [float(b.max()) - float(b.min()) for b in dense]
        values.append([10 * math.log10(r**2 / e) if e else math.inf for r, e in zip(ranges, errors, strict=True)])
    assert found.likeness.latent_psnr[:2] == (math.inf, math.inf) and found.likeness.identical == (
        True,
        True,
        False,
        False,
    )
    assert found.likeness.latent_psnr[2:] == pytest.approx(
        [sum(column) / 2 for column in zip(*values, strict=True)][2:]
    )
    assert found.noise.latent_psnr == (math.inf,) * STEPS and all(found.noise.identical)
    last = next(row for row in found.rows() if row[0] == "PSNR of the last latents")
    assert last[1:3] == ("bit-identical", f"{found.likeness.latent_psnr[3]:.1f} dB")


def test_measures_are_those_of_the_handle(pipe, found):
    with attn_plugins.patched(pipe, "gna", **SETTING) as handle, handle.measure(rows=16) as measures:
        latents_per_step(pipe, 0)
    assert found.measures.layer_steps == measures.layer_steps and {row.step for row in measures.layer_steps} == {2, 3}
    head, *steps = found.per_step()
    assert head == ("step", "drift", "PSNR", "floor", "recall", "oracle", "density", "rel. L1")
    assert steps[1][2:] == ("identical", "identical", "-", "-", "-", "-")
    recall = sum(row.recall for row in found.measured_in(3)) / 2
    assert steps[3][4] == f"{recall:.1%}" and measures.table() in str(found)


def test_steps_and_layers_as_files(found, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    steps, layers, plot = measure_files.write(found, tmp_path / "new", "wan")
    assert [path.name for path in (steps, layers, plot)] == ["wan_steps.csv", "wan_layers.csv", "wan_steps.png"]
    with steps.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["latent_psnr"] == "inf" for row in rows] == [True, True, False, False]
    assert all(row["floor_psnr"] == "inf" and row["floor_bit_identical"] == "True" for row in rows)
    assert rows[0]["recall"] == "" and 0 < float(rows[3]["recall"]) < float(rows[3]["oracle"]) < 1
    assert len(layers.read_text().splitlines()) == 1 + 4
    with image.open(plot) as picture:
        with_maps = picture.height
    alone = dataclasses.replace(found, measures=None)
    paths = measure_files.write(alone, tmp_path, "alone")
    assert [path.name for path in paths] == ["alone_steps.csv", "alone_steps.png"]
    with image.open(paths[1]) as picture:
        assert picture.height < with_maps, "the curve without the maps"
    assert len(alone.per_step()[0]) == 4


def test_a_run_from_mid_schedule_ends_where_the_schedule_does(found):
    later = dataclasses.replace(found, steps=3)
    assert later.measured_in(2) == found.measured_in(3) != [] and later.measured_in(0) == found.measured_in(1) == []


def test_a_floor_that_is_not_identical_is_shown(found, tmp_path):
    noise = dataclasses.replace(
        found.noise, identical=(True, False, False, False), latent_psnr=(math.inf, 90.0, 80.0, 70.0)
    )
    noisy = dataclasses.replace(found, noise=noise)
    assert [row[3] for row in noisy.per_step()[1:]] == ["identical", "90.0 dB", "80.0 dB", "70.0 dB"]
    pytest.importorskip("matplotlib")
    pictures = [
        measure_files.plot(one, tmp_path / name).read_bytes() for one, name in ((found, "a.png"), (noisy, "b.png"))
    ]
    assert pictures[0] != pictures[1]


def test_frames_are_those_of_the_pipeline(pipe, found):
    video = pipe(**CALL, generator=torch.Generator().manual_seed(1), output_type="pt").frames
    dense, patched = found.frames[1]
    assert dense.shape == (1, 9, 3, 64, 64)
    assert torch.equal(dense, video.clamp(0, 1))
    assert not torch.equal(dense, patched)


def test_times_are_positive_and_bounds_follow_amdahl(found):
    for timing in (found.dense, found.patched):
        assert 0 < timing.attention < timing.timed_step
        assert 0 < timing.step < timing.job
    assert found.step_bound == pytest.approx(1 / (1 - found.share))
    assert found.job_bound == pytest.approx(1 / (1 - found.share * 0.5))
    assert found.step_speedup == found.dense.step / found.patched.step


def test_density_is_that_of_the_setting(found):
    assert found.density == pytest.approx(0.5)


def test_the_pipeline_is_left_as_it_was(pipe, found):
    assert not patches_of(pipe.transformer)
    assert pipe._progress_bar_config == {"disable": True}


def test_render_has_every_measure(found):
    text = str(found)
    for word in (
        "step",
        "attention in a step",
        "whole job",
        "density",
        "drift",
        "PSNR",
        "SSIM",
        "dense again",
        "3x4x2",
    ):
        assert word in text
    assert "equal" in text and f"{found.likeness.psnr:.1f} dB" in text


def test_pictures(found, tmp_path):
    image = pytest.importorskip("PIL.Image")
    paths = pictures.write(found, tmp_path / "new", "wan")
    assert [path.name for path in paths] == ["wan.png", "wan.gif"]
    with image.open(paths[1]) as film:
        assert film.n_frames == 9
    with image.open(paths[0]) as sheet:
        assert sheet.width >= 8 * 64 and sheet.height >= 4 * 64, "two seeds, dense and patched, 8 frames each"


def test_latents_alone_give_no_pictures(pipe, tmp_path):
    call = {**CALL, "output_type": "latent", "num_inference_steps": 1}
    without = compare(pipe, "gna", call_kwargs=call, options={**SETTING, "dense_steps": 0})
    assert without.frames == () and without.likeness.psnr is None
    assert "PSNR" not in [row[0] for row in without.rows()] and "PSNR of the last latents" in str(without)
    assert pictures.write(without, tmp_path, "wan") == []


def test_latents_become_pictures_by_to_frames(pipe):
    def grey(latents):
        return latents[:, 0].float().sigmoid().mul(255).round().to(torch.uint8)

    call = {**CALL, "output_type": "latent", "num_inference_steps": 1, "height": 128, "width": 128}
    found = compare(pipe, "gna", call_kwargs=call, options={**SETTING, "dense_steps": 0}, to_frames=grey)
    assert found.frames[0][0].shape == (1, 3, 1, 16, 16)
    assert found.likeness.psnr is not None and found.likeness.ssim is not None


def test_as_frames():
    assert as_frames(torch.full((1, 2, 3, 4), 255, dtype=torch.uint8)).shape == (1, 2, 1, 3, 4)
    assert as_frames(torch.full((2, 3, 4, 4), 1.5)).amax() == 1 and as_frames(torch.zeros(2, 3, 4, 4)).shape[1] == 1
    assert as_frames([1]) is None and as_frames(torch.zeros(3)) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(call_kwargs={"generator": None}), "'generator', which compare sets itself"),
        (dict(call_kwargs={"prompt": "a", "hight": 3}), "hight, which WanPipeline does not take"),
        (dict(seeds=()), "seeds is empty"),
    ],
)
def test_refusals(pipe, change, message):
    with pytest.raises(ValueError, match=message):
        compare(pipe, "gna", **change)
    assert not patches_of(pipe.transformer)


def test_a_patched_pipeline_is_refused(pipe):
    with (
        attn_plugins.patched(pipe, "gna", **SETTING),
        pytest.raises(ValueError, match="patched already: attn_plugins.unpatch"),
    ):
        compare(pipe, "gna", call_kwargs=CALL)


def test_a_failure_in_mid_run_leaves_no_patch(pipe):
    with pytest.raises(ValueError, match="window=99"):
        compare(pipe, "gna", call_kwargs=CALL, options={**SETTING, "window": 99, "small_grid": "error"})
    assert not patches_of(pipe.transformer)
    assert pipe._progress_bar_config == {"disable": True}


def test_progress_shows_and_ends(pipe, capsys):
    compare(pipe, "gna", call_kwargs={**CALL, "num_inference_steps": 1}, options=SETTING, progress=True)
    assert not patches_of(pipe.transformer)
