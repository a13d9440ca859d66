"""Tasks: items by number, the same for every process; what is held out; losses of each item."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.training.pictures import DigitPictures
from attn_plugins.training.tasks.classes import ClassesTask
from attn_plugins.training.tasks.denoising import STEPS, DenoisingTask
from attn_plugins.training.tasks.mixed import MixedTask
from attn_plugins.training.tasks.text import TextTask

transformers = pytest.importorskip("transformers")


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def text_task(**more: Any) -> TextTask:
    ids = torch.randint(1, 50, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    return TextTask(tiny_llama, ids[:300], ids[300:], length=16, windows=5, start=0, **more)


def test_rows_of_text_are_text_and_depend_on_their_number_alone() -> None:
    task = text_task()
    whole = task.batch(range(0, 6), seed=3)
    parts = torch.cat([task.batch(range(first, first + 2), seed=3) for first in (0, 2, 4)])
    assert torch.equal(whole, parts) and whole.shape == (6, 17) and (whole[:, 0] == 0).all()
    assert not torch.equal(whole, task.batch(range(0, 6), seed=4))
    text = task.text.tolist()
    assert all(any(text[at : at + 16] == row for at in range(300)) for row in whole[:, 1:].tolist())


def test_held_out_windows_are_disjoint_and_never_trained_on() -> None:
    task = text_task()
    windows = [task.held_out(number)[0, 1:].tolist() for number in range(5)]
    assert sum(windows, []) == [token for n in range(5) for token in task.kept[20 * n : 20 * n + 16].tolist()]


def test_losses_of_text_are_those_of_transformers() -> None:
    task, model = text_task(), tiny_llama()
    batch = task.batch(range(3), seed=0)
    with torch.no_grad():
        found = task.losses(model, batch)
        want = [model(input_ids=row[None], labels=row[None]).loss for row in batch]
    torch.testing.assert_close(found, torch.stack(want))
    assert task.shown(found[0].item()) == math.exp(found[0].item())


def test_text_that_is_too_short_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"10 tokens to train on and 20 held out: rows of 16 tokens, and 5"):
        TextTask(tiny_llama, [1] * 10, [1] * 20, length=16, windows=5)


def test_tasks_in_turn_have_each_its_own_items() -> None:
    """Item n is item n // 3 of task n % 3, in training and held out; a batch does not depend on where it is cut."""
    tasks = [text_task(name=name) for name in "abc"]
    for number, task in enumerate(tasks):
        task.text, task.kept = task.text.roll(number), task.kept.roll(number)
    mixed = MixedTask(tasks)
    whole = mixed.batch(range(2, 9), seed=3)
    for row, number in zip(whole, range(2, 9), strict=True):
        own = number // 3
        assert torch.equal(row, tasks[number % 3].batch(range(own, own + 1), seed=3)[0])
    assert torch.equal(torch.cat([mixed.batch(range(2, 4), seed=3), mixed.batch(range(4, 9), seed=3)]), whole)
    kept = [mixed.held_out(number) for number in range(6)]
    assert all(torch.equal(item, tasks[number % 3].held_out(number // 3)) for number, item in enumerate(kept))
    assert len({tuple(item[0].tolist()) for item in kept}) == 6
    model = mixed.load()
    with torch.no_grad():
        torch.testing.assert_close(mixed.losses(model, whole), tasks[1].losses(model, whole))
    assert (
        mixed.unit == "perplexity" and mixed.shown(1.0) == math.e and mixed.moved(whole, torch.device("cpu")) is whole
    )
    assert (
        repr(mixed)
        == "a, 300 tokens in rows of 16 and b, 300 tokens in rows of 16 and c, 300 tokens in rows of 16, in turn"
    )


def test_tasks_that_are_judged_differently_are_not_mixed() -> None:
    other = text_task()
    other.unit = "loss"  # type: ignore[misc]
    for tasks in ([], [text_task(), other]):
        with pytest.raises(ValueError, match="give one task or more, all judged by the same unit"):
            MixedTask(tasks)


def test_pictures_and_their_classes() -> None:
    from attn_plugins.training.classifying import small_vit

    pytest.importorskip("sklearn")
    data = DigitPictures(32)
    task = ClassesTask(lambda: small_vit(data, 32), data)
    pixels, labels = task.batch(range(2, 5), seed=0)
    assert torch.equal(pixels[1], data.item(3)[0]) and labels[1] == data.item(3)[1]
    assert not torch.equal(pixels, task.batch(range(2, 5), seed=1)[0])
    model = task.load().eval()
    with torch.no_grad():
        want = F.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="none")
        torch.testing.assert_close(task.losses(model, (pixels, labels)), want)


def test_noise_is_told_at_every_level() -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}

    def load() -> Any:
        torch.manual_seed(0)
        return diffusers.DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=1000).eval()

    task = DenoisingTask(load, DigitPictures(32))
    batch = task.batch(range(4), seed=0)
    assert batch.latents.shape == batch.noise.shape == (4, 4, 8, 8) and len(set(batch.timesteps.tolist())) == 4
    assert torch.equal(batch.latents[:, 3], batch.latents[:, 0])  # three channels for four
    late = batch._replace(timesteps=torch.full((4,), STEPS - 1))
    torch.testing.assert_close(task.inputs(late)["hidden_states"], batch.noise, atol=0.05, rtol=0)
    early = batch._replace(timesteps=torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(task.inputs(early)["hidden_states"], batch.latents, atol=0.06, rtol=0)
    with torch.no_grad():
        found, whole = task.losses(load(), batch), load()(**task.inputs(batch)).sample
    torch.testing.assert_close(found, ((whole[:, :4] - batch.noise) ** 2).mean((1, 2, 3)))
    levels = [int(task.held_out(number).timesteps) for number in range(9)]
    assert len(set(levels)) == 8 and levels[8] == levels[0]
