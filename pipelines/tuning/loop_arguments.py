"""What the training examples share on their command lines: the loop, the accelerator, stopping and going on."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_plugins.training.loop import LoopSettings

NAMES = ("steps", "batch", "lr", "seed", "save_every", "held_out")
WORDS = {"steps": "of the optimizer", "lr": "peak rate of AdamW", "save_every": "steps between checkpoints"}
FLAGS = ("lora", "checkpointing")


def add_loop_arguments(
    parser: argparse.ArgumentParser,
    out: Path,
    defaults: LoopSettings,
    words: Mapping[str, str],
    *,
    lora: str | None = None,
    dense: str | None = None,
) -> None:
    """Options of `LoopSettings`, and of how a run is made.

    Args:
        out: default folder.
        words: what a batch, the seed and held-out items are; what else should read otherwise than in `WORDS`.
        lora: what --lora trains; None: there is no such option.
        dense: what --no-dense skips; None: there is no such option.
    """
    add = parser.add_argument
    add("--out", type=Path, default=out)
    add("--resume", action="store_true", help="take up what --out has; to the bit what it had been without a stop")
    if dense is not None:
        add("--no-dense", action="store_true", help=f"skip the dense run, to which {dense} is compared")
    if lora is not None:
        add("--lora", type=int, default=0, metavar="RANK", help=f"train {lora}; default: all weights")
    add("--checkpointing", action="store_true", help="recompute activations in the backward: slower, less memory")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate launch` says, else no")
    add("--threads", type=int, default=0, help="of the CPU; 0 leaves PyTorch's own choice")
    told = {**WORDS, **words}
    for name in NAMES:
        value = getattr(defaults, name)
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{told[name]}; default {value}")


def loop_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LoopSettings`, or of a class of its own settings, from what was said."""
    known = {field.name for field in dataclasses.fields(LoopSettings)}
    return {name: getattr(args, name) for name in (*NAMES, *FLAGS) if name in known and hasattr(args, name)}


def accelerator_of(args: argparse.Namespace) -> Any:
    """An `accelerate.Accelerator`. Without a device accelerate has to be told so, or several processes do not find each
    other."""
    import torch
    from accelerate import Accelerator

    if args.threads:
        torch.set_num_threads(args.threads)
    return Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.accelerator.is_available())
