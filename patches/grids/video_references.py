"""What the tokens of a video transformer are, where pictures, clips or a history stand beside the video.

The video is the grid; what stands beside it is like text: dense, on its side of the grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attn_plugins.patches.grids.arguments import Args, Kwargs, TensorReading, argument, text_lengths
from attn_plugins.patches.grids.video import Grid, channels_last, latent_grid
from attn_plugins.sequence import Sequence


def wan_animate(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The first of the T + 1 frames is the picture of the character."""
    frames, height, width = latent_grid(root, args, kwargs)
    if frames < 2:
        return "there is no frame after the picture of the character"
    return Sequence((frames - 1, height, width), text_before=height * width)


def _leading_references(control: torch.Tensor, channels: int) -> int:
    """Frames of a control (B, C, T, H, W) before the first whose second `channels` channels are not all zeros."""
    empty = ~control[:, channels : 2 * channels].ne(0).any(dim=4).any(dim=3).any(dim=1).any(dim=0)
    count = int(empty.long().cumprod(dim=0).sum())
    return 0 if count == control.shape[2] else count


_references = TensorReading(_leading_references)


def wan_vace(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Reference pictures are frames before the video. Of these the control latents have no reactive part.

    control_hidden_states holds the latents of what is kept (as many channels as the model's latents), of what is to be
    made anew (as many), and the mask. An encoded frame is never all zeros, the missing part of a reference is.
    """
    frames, height, width = latent_grid(root, args, kwargs)
    control = argument(root, args, kwargs, "control_hidden_states")
    count = _references(control, root.config.in_channels) // root.config.patch_size[0]
    return Sequence((frames - count, height, width), text_before=count * height * width)


def _tokens(latents: Any, kernel: Grid) -> int:
    """Tokens of history latents (B, C, T, H, W), padded to whole patches; 0 where there are none."""
    return (
        0 if latents is None else math.prod(-(-size // k) for size, k in zip(latents.shape[-3:], kernel, strict=True))
    )


def framepack(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """History at a quarter, at half, at full size, then the section, then a picture's tokens and text.

    One item alone comes without the padding of its text.
    """
    rows = (
        ("latents_history_4x", "indices_latents_history_4x", (4, 8, 8)),
        ("latents_history_2x", "indices_latents_history_2x", (2, 4, 4)),
        ("latents_clean", "indices_latents_clean", (1, 2, 2)),
    )
    picture = argument(root, args, kwargs, "image_embeds").shape[1]
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    lengths = text_lengths(argument(root, args, kwargs, "encoder_attention_mask"))
    return Sequence(
        latent_grid(root, args, kwargs),
        text_before=_history(root, args, kwargs, rows),
        text_after=picture + text,
        valid_after=tuple(picture + length for length in lengths),
    )


def helios(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Long, middle and short history, each coarser than the next, then the section; no text."""
    rows = (
        ("latents_history_long", "indices_latents_history_long", (4, 8, 8)),
        ("latents_history_mid", "indices_latents_history_mid", (2, 4, 4)),
        ("latents_history_short", "indices_latents_history_short", tuple(root.config.patch_size)),
    )
    return Sequence(latent_grid(root, args, kwargs), text_before=_history(root, args, kwargs, rows))


def _history(root: Any, args: Args, kwargs: Kwargs, rows: tuple[tuple[str, str, Any], ...]) -> int:
    """Tokens of the latents that come with their indices: the models leave out the others."""
    given = [(argument(root, args, kwargs, name), argument(root, args, kwargs, ids), k) for name, ids, k in rows]
    return sum(_tokens(latents, kernel) for latents, indices, kernel in given if indices is not None)


def _rasters(coords: torch.Tensor) -> list[tuple[int, Grid]]:
    """The rasters that a sequence is made of, in order: (first token, (T, H, W)).

    coords: (B, 3, N) or (B, 3, N, 2), time, row and column of each token (or where they begin). A raster is as long as
    time, row and column rise as they do in one; each token belongs to one. Only the first item is read.
    """
    first = coords[0, ..., 0] if coords.ndim == 4 else coords[0]
    times, rows, columns = first.double().cpu().tolist()
    found, start = [], 0
    while start < len(times):
        grid = _raster_from(times, rows, columns, start)
        found.append((start, grid))
        start += math.prod(grid)
    return found


def _raster_from(times: list[float], rows: list[float], columns: list[float], start: int) -> Grid:
    """The largest raster that begins at token `start`: the longest row, then rows like it, then frames like it."""
    total = len(times)
    width = 1
    while (
        (at := start + width) < total
        and times[at] == times[start]
        and rows[at] == rows[start]
        and columns[at] > columns[at - 1]
    ):
        width += 1
    height = 1
    while (
        (end := (at := start + height * width) + width) <= total
        and all(time == times[start] for time in times[at:end])
        and columns[at:end] == columns[start : start + width]
        and all(row == rows[at] for row in rows[at:end])
        and rows[at] > rows[at - 1]
    ):
        height += 1
    plane = height * width
    frames = 1
    while (
        (end := (at := start + frames * plane) + plane) <= total
        and all(time == times[at] for time in times[at:end])
        and times[at] > times[at - 1]
        and rows[at:end] == rows[start : start + plane]
        and columns[at:end] == columns[start : start + plane]
    ):
        frames += 1
    return frames, height, width


_rasters_of = TensorReading(_rasters)


def ltx_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Packed tokens (B, N, C). The grid is in num_frames, height, width, or the largest raster of video_coords.

    Keyframes and clips that a person conditions on are tokens before the video (LTXConditionPipeline).
    """
    count = argument(root, args, kwargs, "hidden_states").shape[1]
    sizes = [argument(root, args, kwargs, name) for name in ("num_frames", "height", "width")]
    if all(size is not None for size in sizes) and math.prod(sizes) == count:
        return Sequence(tuple(int(size) for size in sizes))
    coords = argument(root, args, kwargs, "video_coords")
    if coords is None or coords.shape[2] != count:
        return "num_frames, height and width are not those of the tokens, and no video_coords say where they are"
    start, grid = max(_rasters_of(coords), key=lambda row: (math.prod(row[1]), row[0]))
    if min(grid) == 1 and math.prod(grid) < count:
        return "video_coords hold no raster of frames, rows and columns"
    return Sequence(grid, text_before=start, text_after=count - start - math.prod(grid))


def ltx2(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Packed tokens (B, N, C): the video, whose grid is in num_frames, height, width, then keyframes and references."""
    count = argument(root, args, kwargs, "hidden_states").shape[1]
    sizes = [argument(root, args, kwargs, name) for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        return "num_frames, height and width were not given to the model"
    frames, height, width = (int(size) for size in sizes)
    video = frames * height * width
    coords = argument(root, args, kwargs, "video_coords")
    if video != count:
        if coords is None or coords.shape[2] != count:
            return f"{count} tokens where num_frames, height and width make {video}, and no video_coords say more"
        _, grid = _rasters_of(coords)[0]
        if grid[1:] != (height, width) or grid[0] < frames:
            return "the first tokens of video_coords are not the video"
    return Sequence((frames, height, width), text_after=count - video)


_last_step_is_back = TensorReading(lambda positions: bool(positions[-1] <= positions[-2]))


def kandinsky6(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, T, H, W, C), no text. A picture to begin with is a last frame that stands where the first."""
    frames, height, width = channels_last(root, args, kwargs)
    positions = argument(root, args, kwargs, "visual_rope_pos")
    if positions is not None and frames > 1 and _last_step_is_back(positions[0]):
        return Sequence((frames - 1, height, width), text_after=height * width)
    return Sequence((frames, height, width))
