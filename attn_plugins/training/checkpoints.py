"""Checkpoints of a run under accelerate: weights, optimizer, random state, and what the run was."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attn_plugins.training.processes import by_all, by_main

STATE, TRAINED = "run.json", "trained.safetensors"


@contextlib.contextmanager
def trained_only(accelerator: Any) -> Iterator[None]:
    """Inside, accelerate's checkpoints have of the model what is trained: a LoRA's is small."""
    from safetensors.torch import load_file, save_file

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # accelerate writes what is left in it
        if accelerator.is_main_process:
            named = accelerator.unwrap_model(models[0]).named_parameters()
            save_file({name: part.detach() for name, part in named if part.requires_grad}, Path(folder, TRAINED))

    def load(models: list[Any], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        model.load_state_dict(load_file(Path(folder, TRAINED)), strict=False)

    handles = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save(accelerator: Any, folder: Path, identity: Mapping[str, Any], losses: list[float]) -> None:
    """Replace the checkpoint in `folder`. One that is cut short while writing leaves the last one in place."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")

    def replace() -> None:
        (new / STATE).write_text(json.dumps({"identity": identity, "losses": losses}), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    by_all(accelerator, lambda: accelerator.save_state(str(new)))
    by_main(accelerator, replace)


def load(accelerator: Any, folder: Path, identity: Mapping[str, Any]) -> list[float]:
    """Take up the run in `folder`; its losses so far, none where there is no checkpoint.

    Raises:
        ValueError: it is of another run; the message says what differs.
    """
    if not (folder / STATE).is_file():
        return []
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(identity))
    for name in now | saved["identity"]:
        before, given = saved["identity"].get(name), now.get(name)
        if before != given:
            raise ValueError(
                f"{folder} is of a run with {name}={before!r}, this one has {given!r}: "
                "resume with the same settings, or begin in another folder"
            )
    accelerator.load_state(str(folder))
    return saved["losses"]
