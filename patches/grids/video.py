"""What the tokens of a video transformer are, where they are nothing but a grid."""

from __future__ import annotations

from typing import Any

from attn_plugins.patches.grids.arguments import Args, Kwargs, argument
from attn_plugins.sequence import Sequence

Grid = tuple[int, int, int]


def latent_grid(root: Any, args: Args, kwargs: Kwargs) -> Grid:
    """(T, H, W) of hidden_states (B, C, T, H, W).

    The config says what a token is as patch_size of three ints, or as patch_size and, perhaps, patch_size_t.
    """
    frames, height, width = argument(root, args, kwargs, "hidden_states").shape[-3:]
    patch = root.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(root.config, "patch_size_t", None) or 1, patch, patch)
    return frames // patch[0], height // patch[1], width // patch[2]


def patched_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, C, T, H, W), no text: Wan and what is made from it, Cosmos, Allegro."""
    return Sequence(latent_grid(root, args, kwargs))


def frames_first(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, T, C, H, W), no text: AnyFlow."""
    _, frames, _, height, width = argument(root, args, kwargs, "hidden_states").shape
    patch = root.config.patch_size
    return Sequence((frames // patch[0], height // patch[1], width // patch[2]))


def each_frame(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, C, T, H, W), of which a block sees one frame at a time: the spatial blocks of Latte."""
    return Sequence(latent_grid(root, args, kwargs)[1:])


def kandinsky5(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, T, H, W, C), no text; T is 1 for pictures. Its own sparse attention reorders the tokens."""
    if argument(root, args, kwargs, "sparse_params") is not None:
        return "the checkpoint runs its own sparse attention (NABLA), in an order of its own"
    return Sequence(channels_last(root, args, kwargs))


def channels_last(root: Any, args: Args, kwargs: Kwargs) -> Grid:
    """(T, H, W) of hidden_states (B, T, H, W, C)."""
    _, frames, height, width, _ = argument(root, args, kwargs, "hidden_states").shape
    patch = root.config.patch_size
    return frames // patch[0], height // patch[1], width // patch[2]
