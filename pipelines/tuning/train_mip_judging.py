"""How well references are bound to their names: where they are put, what the loss says, and what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_plugins.methods.mip import ReferenceMaps
from attn_plugins.metrics.confusion import dice
from attn_plugins.pipelines.tuning.train_mip_inputs import AdapterInputs, names_of
from attn_plugins.training.mip import held_out_batch
from attn_plugins.training.seeds import seeded
from attn_plugins.training.two_objects import ObjectData, TwoObjects

AT_ONCE = 16  # pictures in a forward
TIE = 1e-5  # share of a loss that rounding may make


def set_phrases(handle: Any, inputs: AdapterInputs, names: Sequence[tuple[str, ...]], guided: bool = False) -> None:
    """Each item of the next batch has phrases of its own; under guidance the batch is twice as long."""
    rows, lengths = inputs.phrases(names)
    if guided:
        rows, lengths = rows.repeat(2, 1, 1, 1), lengths.repeat(2, 1)
    handle.patches[0].layers[0].references.phrases.set(rows, lengths)


@torch.no_grad()
def held_out_maps(
    inputs: AdapterInputs, handle: Any | None, data: ObjectData, count: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Of `count` held-out pictures, each at one level of noise: Dice of w_i against the objects' masks ({} without a
    patch), "picture" over all of the picture and "objects" where the two objects are, at which an even mean has one
    half; and of how many the loss is lower with the references in their order than with them swapped, 1, 0, or 0.5."""
    found: dict[str, list[float]] = {"picture": [], "objects": []}
    lower: list[float] = []
    unet = inputs.pipe.unet
    for first in range(0, count, AT_ONCE):
        batch = held_out_batch(data, range(first, min(first + AT_ONCE, count)), count)
        losses = []
        for swapped in (False, True):
            references = [item.references.flip(0) if swapped else item.references for item in batch.items]
            args, kwargs, target, _ = inputs.forward(batch, references=references)
            if handle is None:
                out = unet(*args, **kwargs)[0]
            else:
                set_phrases(handle, inputs, names_of(batch.items))
                with ReferenceMaps(handle) as maps:
                    out = unet(*args, **kwargs)[0]
                if not swapped:
                    masks = torch.stack([item.masks for item in batch.items]).gt(0.5).float().to(out.device)
                    shares = maps.mean(tuple(masks.shape[2:])).clamp(0, 1)  # type: ignore[arg-type]
                    here = masks.sum(1, keepdim=True).clamp(0, 1)
                    found["picture"] += dice(shares, masks).mean(1).tolist()
                    found["objects"] += dice(shares * here, masks).mean(1).tolist()
            losses.append((out.float() - target).square().flatten(1).mean(1))
        right, wrong = losses
        tie = (right - wrong).abs() <= TIE * wrong
        lower += torch.where(tie, 0.5, (right < wrong).float()).tolist()
    return (found if handle is not None else {}), lower


def swapped_looks(data: ObjectData, item: TwoObjects) -> torch.Tensor:
    """References (2, 3, h, w) of the same names with each other's looks, if the data can make them; else swapped."""
    other = getattr(data, "swapped", None)
    return other(item) if other is not None else item.references.flip(0)


@torch.no_grad()
def drawn(
    inputs: AdapterInputs, handle: Any | None, data: ObjectData, count: int, *, steps: int, guidance: float
) -> list[torch.Tensor]:
    """Pictures (2, 3, H, W) in 0..1 of `count` held-out pairs, from the same noise: with their references, and with
    references of the same names that have swapped their looks."""
    pipe, found = inputs.pipe, []
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    for first in range(0, count, AT_ONCE // 2):
        numbers = range(first, min(first + AT_ONCE // 2, count))
        items = [data.held_out(number) for number in numbers]
        noise = [torch.randn(channels, side, side, generator=seeded("drawn", number)) for number in numbers]
        references = [item.references for item in items] + [swapped_looks(data, item) for item in items]
        if handle is not None:
            set_phrases(handle, inputs, names_of(items + items), guidance > 1)
        out = sampled(inputs, items + items, references, torch.stack(noise * 2), steps, guidance).cpu()
        found += [torch.stack([out[i], out[len(items) + i]]) for i in range(len(items))]
    return found


def sampled(
    inputs: AdapterInputs, items: Sequence[TwoObjects], references: Sequence[torch.Tensor], noise: torch.Tensor,
    steps: int, guidance: float,
) -> torch.Tensor:  # fmt: skip
    """Pictures (B, 3, H, W) in 0..1. By hand, for a pipeline gives all prompts of a call the same references."""
    pipe, dtype, guided = inputs.pipe, inputs.pipe.unet.dtype, guidance > 1
    text, pooled = inputs.text([item.prompt for item in items])
    images = inputs.images(references).to(dtype)
    if guided:
        empty, empty_pooled = inputs.text([""] * len(items))
        text = torch.cat([empty, text])
        pooled = None if pooled is None or empty_pooled is None else torch.cat([empty_pooled, pooled])
        nothing = inputs.images(references, torch.ones(len(references), dtype=torch.bool)).to(dtype)
        images = torch.cat([nothing, images])
    more = inputs.added(images, pooled, inputs.size)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps, device=inputs.device)
    latents = noise.to(inputs.device, dtype) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, time)
        out = pipe.unet(given, time, text.to(dtype), added_cond_kwargs=more, return_dict=False)[0]
        if guided:
            without, with_all = out.chunk(2)
            out = without + guidance * (with_all - without)
        latents = scheduler.step(out, time, latents, return_dict=False)[0]
    return inputs.pictures(latents)


def decisions(data: Any, count: int, pictures: Sequence[torch.Tensor]) -> list[list[list[float] | None]]:
    """Of the two pictures of each pair, whether each object has the looks of its own reference (1, 0); None of a
    picture where not both are to be found. Of data that can find its objects in a picture."""
    return [
        [data.told_apart(picture, data.held_out(number), bool(turned)) for turned, picture in enumerate(both)]
        for number, both in zip(range(count), pictures, strict=True)
    ]
