"""What an IP-Adapter's layer holds of its images, per reference: tokens, scales and masks of all adapters as one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

Images = Sequence[torch.Tensor]  # (B, images, T, C), one an adapter


def groups(counts: Sequence[int], photos: Sequence[int]) -> list[list[tuple[int, int]]]:
    """(first image, images) of each reference, adapter by adapter.

    Raises:
        ValueError: photos that are not as many as the images, or a reference with photos in two adapters.
    """
    if sum(counts) != sum(photos):
        raise ValueError(f"{sum(photos)} images are named, and there are {sum(counts)}")
    found: list[list[tuple[int, int]]] = []
    waiting = iter(photos)
    for count in counts:
        row: list[tuple[int, int]] = []
        first = 0
        while first < count:
            size = next(waiting)
            if first + size > count:
                raise ValueError(
                    f"photos={tuple(photos)}: the adapters have {', '.join(map(str, counts))} images, so that one "
                    "reference would have photos in two of them"
                )
            row.append((first, size))
            first += size
        found.append(row)
    return found


def image_tokens(
    adapter: Any, images: Images, photos: Sequence[int], heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values of all references, (B, R, H, T, D), and how many of the T tokens are real where adapters differ.

    Of a reference with several photos it is the mean of their tokens.
    """
    keys, values, lengths = [], [], []
    rows = groups([one.shape[1] for one in images], photos)
    for tokens, row, to_k, to_v in zip(images, rows, adapter.to_k_ip, adapter.to_v_ip, strict=True):
        if any(size > 1 for _, size in row):
            tokens = torch.stack([tokens[:, first : first + size].mean(1) for first, size in row], dim=1)
        keys.append(to_k(tokens))  # (B, r, T, C)
        values.append(to_v(tokens))
        lengths += [tokens.shape[2]] * len(row)
    most = max(lengths)
    if min(lengths) == most:
        told = None
    else:
        keys, values = ([_padded(t, most) for t in some] for some in (keys, values))
        told = _lengths(tuple(lengths), keys[0].device)
    joined = (some[0] if len(some) == 1 else torch.cat(some, dim=1) for some in (keys, values))
    k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in joined)
    return k, v, told


def reference_scales(scale: Sequence[Any], counts: Sequence[int], photos: Sequence[int]) -> tuple[float, ...]:
    """One number a reference from what `set_ip_adapter_scale` left: per adapter a number, or a list.

    Raises:
        ValueError: a list that is neither one per image nor one per reference of its adapter.
    """
    found: list[float] = []
    for one, row, count in zip(scale, groups(counts, photos), counts, strict=True):
        if not isinstance(one, (list, tuple)):
            found += [float(one)] * len(row)
        elif len(one) == len(row):
            found += map(float, one)
        elif len(one) == count:
            found += [sum(map(float, one[first : first + size])) / size for first, size in row]
        else:
            raise ValueError(f"set_ip_adapter_scale gave {len(one)} scales to an adapter with {len(row)} references")
    return tuple(found)


def reference_rows(rows: torch.Tensor, counts: Sequence[int], photos: Sequence[int]) -> torch.Tensor:
    """(R, C) from what each adapter has, (adapters, C).

    Raises:
        ValueError: another number of adapters.
    """
    if len(rows) != len(counts):
        raise ValueError(f"checkpoint names {len(rows)} files, and there are {len(counts)} IP-Adapters: one for each")
    return torch.cat([row.expand(len(own), -1) for row, own in zip(rows, groups(counts, photos), strict=True)])


def reference_masks(
    masks: Any, counts: Sequence[int], photos: Sequence[int], positions: int, device: torch.device
) -> torch.Tensor:
    """(1, R, S) in float32 from the pipeline's `ip_adapter_masks`: per adapter (1, images, height, width), or None.

    Bicubic, as diffusers shrinks them; it leaves 0..1 a little. Of several photos the largest counts.

    Raises:
        ValueError: masks that do not fit the images.
    """
    each = list(masks) if isinstance(masks, (list, tuple)) else list(masks.unsqueeze(1))
    if len(each) != len(counts):
        raise ValueError(f"ip_adapter_masks has {len(each)} entries for {len(counts)} IP-Adapters: give one for each")
    return torch.cat(list(_shrunk(each, counts, photos, positions, device)))[None]


def _shrunk(
    masks: list[Any], counts: Sequence[int], photos: Sequence[int], positions: int, device: torch.device
) -> Iterator[torch.Tensor]:
    from diffusers.image_processor import IPAdapterMaskProcessor

    for mask, row, count in zip(masks, groups(counts, photos), counts, strict=True):
        if mask is None:
            yield torch.ones(len(row), positions, device=device)
            continue
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] not in (count, len(row)):
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"ip_adapter_masks has {shape} for an adapter with {len(row)} references: give (1, {len(row)}, height, "
                "width), made by IPAdapterMaskProcessor"
            )
        small = IPAdapterMaskProcessor.downsample(mask[0].float(), 1, positions, 1)[..., 0].to(device)
        if mask.shape[1] != len(row):
            small = torch.stack([small[first : first + size].amax(0) for first, size in row])
        yield small


def _padded(tokens: torch.Tensor, most: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, most - tokens.shape[2]))


@functools.lru_cache(maxsize=64)
def _lengths(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Kept, so that nothing is copied to a device in each call."""
    return torch.tensor([lengths], device=device)


def images_of(embeds: Any) -> list[int]:
    """Images of each adapter, from the `image_embeds` that a pipeline gives its UNet."""
    each = embeds if isinstance(embeds, (list, tuple)) else [embeds[:, None]]
    return [one.shape[1] for one in each]
