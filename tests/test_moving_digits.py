"""The moving digits, and whether the model that we ship has learned them."""

import pytest
import torch

import attn_plugins
from attn_plugins.pipelines.demo_model import asset_folder, contact_sheet, load_pipeline, prompt, save_gif, to_frames
from attn_plugins.training import moving_digits as data

pytest.importorskip("sklearn")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_videos_have_the_stated_shape_and_range():
    video, labels = data.moving_digits(8, 5, generator=seeded())
    assert video.shape == (8, 1, 5, 32, 32) and video.dtype == torch.float32
    assert labels.shape == (8, 2) and labels.min() >= 0 and labels.max() <= 9
    assert video.min() == -1 and 0.6 < video.max() <= 1  # half-pixel positions blur the peak
    assert (video == -1).float().mean() > 0.5  # background


def test_the_seed_decides():
    first, again, other = (data.moving_digits(2, 3, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_test_digits_are_never_trained_on(monkeypatch):
    images, classes = data.digit_images()
    blank = images.clone()
    blank[: data.TEST_FROM] = 0
    monkeypatch.setattr(data, "digit_images", lambda: (blank, classes))
    assert data.moving_digits(64, 1, generator=seeded())[0].max() == -1
    assert (data.moving_digits(64, 1, generator=seeded(), split="test")[0].amax(dim=(1, 2, 3, 4)) > 0).all()


def test_bounce_keeps_the_speed_and_turns_at_the_walls():
    position = data.bounce(torch.tensor([14.0]), torch.tensor([1.5]), 30, 16.0)[0]
    assert position[:4].tolist() == [14.0, 15.5, 15.0, 13.5]  # 17 is reflected to 15
    assert position.min() >= 0 and position.max() <= 16
    moves = position.diff().abs()
    assert ((moves - 1.5).abs() < 1e-5).sum() >= 26  # all but the few steps that contain a turn


def test_whole_positions_place_digits_unblurred():
    weights = data._placement(torch.tensor([3.0]), 32)[0]
    assert torch.equal(weights[3 : 3 + data.DIGIT], torch.eye(data.DIGIT)) and weights.sum() == data.DIGIT


def test_prompts():
    embeds = data.prompt_embeds(["37", "04"])
    assert embeds.shape == (2, 2, data.TEXT_DIM)
    assert torch.equal(embeds, data.prompt_embeds(torch.tensor([[3, 7], [0, 4]])))
    assert embeds[..., :10].argmax(-1).tolist() == [[3, 7], [0, 4]]
    assert not torch.equal(data.prompt_embeds(["37"]), data.prompt_embeds(["73"]).flip(1))  # places differ
    assert data.empty_prompt(3).shape == (3, 2, data.TEXT_DIM) and not data.empty_prompt(3).any()


@pytest.mark.parametrize("wrong", [["3"], ["123"], ["3x"], [], torch.tensor([[3, 12]]), torch.tensor([-1, 2])])
def test_wrong_prompts_are_named(wrong):
    with pytest.raises(ValueError, match="pairs of digits"):
        data.prompt_embeds(wrong)


@pytest.mark.parametrize("sizes", [{"batch": 0, "frames": 1}, {"batch": 1, "frames": 0}])
def test_impossible_sizes_are_named(sizes):
    with pytest.raises(ValueError, match="need batch >= 1"):
        data.moving_digits(**sizes)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_its_preset_says_where_it_was_not_measured(pipe):
    with attn_plugins.patched(pipe, "gna", quality="fast") as handle:
        assert handle.patches[0].state.measured == (1024, 4096)
        with pytest.warns(UserWarning, match="measured at grids of 1,?024 to 4,?096 tokens; this one has 512"):
            pipe(**prompt("37", frames=2, steps=2), generator=torch.Generator().manual_seed(0))
    with attn_plugins.patched(pipe, "gna", window=(2, 8, 8)) as handle:
        assert handle.patches[0].state.measured is None


def test_the_asset_is_small_and_stock(pipe):
    assert sum(file.stat().st_size for file in asset_folder().rglob("*")) <= 10 * 2**20
    assert type(pipe).__name__ == "WanPipeline" and pipe.vae is None
    assert pipe.transformer.config.attention_head_dim == 64


@torch.inference_mode()
def test_the_model_has_learned_digits_and_their_names(pipe):
    """One denoising step on unseen digits: far better than knowing nothing, and better with the right names."""
    video, labels = data.moving_digits(8, 4, generator=seeded(3), split="test")
    noise, s = torch.randn(video.shape, generator=seeded(4)), 0.8
    noisy, time, target = (1 - s) * video + s * noise, torch.full((len(video),), 1000 * s), noise - video

    def error(prompts: torch.Tensor) -> float:
        flow = pipe.transformer(noisy, time, prompts, return_dict=False)[0]
        return (flow - target).square().mean().item()

    right, wrong = error(data.prompt_embeds(labels)), error(data.prompt_embeds((labels + 5) % 10))
    # a model that has learned the average frame only: its flow is off by (its error in the video) / s
    average = (video - video.mean(dim=(0, 2), keepdim=True)).square().mean().item() / s**2
    assert right < 0.1 * target.square().mean().item()  # against predicting zero
    assert right < 0.65 * average
    assert right < 0.85 * wrong


@torch.inference_mode()
def test_the_pipeline_runs_and_its_frames_can_be_saved(pipe, tmp_path):
    latents = pipe(**prompt(["37", "04"], frames=2, steps=2), generator=seeded()).frames
    frames = to_frames(latents)
    assert frames.shape == (2, 2, 32, 32) and frames.dtype == torch.uint8
    assert contact_sheet(frames, upscale=2, gap=2).size == (2 * 66, 2 * 66)
    save_gif(frames, tmp_path / "out.gif")
    assert (tmp_path / "out.gif").stat().st_size > 100
    with pytest.raises(ValueError, match="expected"):
        to_frames(latents.repeat(1, 3, 1, 1, 1))
    with pytest.raises(ValueError, match="frames=65"):
        prompt("37", frames=65)
