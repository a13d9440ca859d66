"""What the tokens of a UNet for video are where it attends over time alone: the frames of a place.

These readers run inside compiled code.
"""

from __future__ import annotations

from typing import Any

from attn_plugins.patches.grids.arguments import Args, Kwargs
from attn_plugins.sequence import Sequence


def tokens_over_time(block: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """One axis: a block's hidden_states are (B * H * W, T, C)."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return Sequence((hidden_states.shape[1],))


def frames(block: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """One axis: a block's hidden_states are (B * T, H * W, C) still, T is num_frames."""
    return Sequence((kwargs["num_frames"] if "num_frames" in kwargs else args[1],))
