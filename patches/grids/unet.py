"""What the tokens of a UNet are: one grid per level, read where a level begins. All of it may run in compiled code."""

from __future__ import annotations

from typing import Any

from attn_plugins.patches.grids.arguments import Args, Kwargs
from attn_plugins.sequence import Sequence


def by_level(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """A UNet has one grid per level: they are read where a level begins."""
    return "this attention runs outside the UNet's transformer blocks"


def feature_map(level: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The (B, C, H, W) that enters a level is its grid."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if hidden_states.ndim != 4:
        return f"a level's input has {hidden_states.ndim} axes, not (B, C, H, W)"
    return Sequence((hidden_states.shape[2], hidden_states.shape[3]))


def feature_map_and_text(level: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text that gives keys only, then the (B, C, H, W) of an attention whose keys are those of both."""
    found, text = feature_map(level, args, kwargs), kwargs.get("encoder_hidden_states")
    return found if isinstance(found, str) or text is None else Sequence(found.grid, text_before=text.shape[1])


def stable_cascade(level: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The block's (B, C, H, W), then the text and pictures of its second argument, which give keys only."""
    found, conditions = feature_map(level, args, kwargs), args[1] if len(args) > 1 else kwargs["kv"]
    return found if isinstance(found, str) else Sequence(found.grid, text_after=conditions.shape[1])


def uvit(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Token ids (B, H, W), halved where the model begins with a smaller map."""
    ids = args[0] if args else kwargs["input_ids"]
    scale = 2 if root.config.downsample else 1
    return Sequence((ids.shape[1] // scale, ids.shape[2] // scale))
