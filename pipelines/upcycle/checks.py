"""What is checked before a byte is written: one architecture, one vocabulary, experts that differ, room on the disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attn_plugins.models.bam import Architecture
from attn_plugins.pipelines.upcycle.checkpoint import Checkpoint
from attn_plugins.pipelines.upcycle.inputs import same_input

# What experts of one architecture may differ in: how they were trained and saved, not what they compute.
FREE = {
    "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob", "auto_map", "bos_token_id",
    "classifier_dropout", "dtype", "embd_pdrop", "encoder_stride", "eos_token_id", "hidden_dropout",
    "hidden_dropout_prob", "id2label", "initializer_range", "label2id", "pad_token_id", "pooler_act",
    "pooler_output_size", "pretraining_tp", "problem_type", "resid_pdrop", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
LABELS = {"id2label", "label2id"}  # a text model's mean nothing
_ROWS = 4 << 20  # elements that are compared at a time


def one_architecture(base: Checkpoint, others: Sequence[Checkpoint], row: Architecture) -> None:
    """Raises:
    ValueError: another model type, size, rope, norm, tie, vocabulary, tokenizer, labels or way to read pictures than
        the base's.
    """
    wanted = base.config.to_dict()
    free = FREE - LABELS if row.vision else FREE
    for other in others:
        told = other.config.to_dict()
        if told["model_type"] != wanted["model_type"]:
            raise ValueError(
                f"{other.folder} is a {told['model_type']} and {base.folder} a {wanted['model_type']}: experts are of "
                "one architecture"
            )
        unlike = sorted(key for key in {*told, *wanted} - free if told.get(key) != wanted.get(key))
        if unlike:
            key = unlike[0]
            more = f" (and {', '.join(unlike[1:])})" if unlike[1:] else ""
            raise ValueError(
                f"{other.folder} has {key} = {_short(told.get(key))}, and {base.folder} has {_short(wanted.get(key))}"
                f"{more}: experts have to agree in all that a model computes"
            )
        same_input(base.folder, other.folder)


def _short(value: Any) -> str:
    """Of a thousand classes, some."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:150]} ...{text[-1]}"


def all_tensors(model: Any, checkpoints: Sequence[Checkpoint], row: Architecture) -> list[dict[str, str]]:
    """For each checkpoint, the tensors of the dense `model` (on the meta device) as it names them.

    Raises:
        ValueError: a tensor that is not there, or has another shape.
    """
    tied = set(model.all_tied_weights_keys)
    found = []
    for checkpoint in checkpoints:
        names = {}
        for name, tensor in model.state_dict().items():
            if name in tied:
                continue
            there = next((spelling for spelling in row.spellings(name) if spelling in checkpoint.shapes), None)
            if there is None:
                raise ValueError(f"{checkpoint.folder} has no {name}: it is no whole {row.prefix}{row.head}")
            if checkpoint.shapes[there] != tuple(tensor.shape):
                raise ValueError(
                    f"{checkpoint.folder}: {there} has shape {checkpoint.shapes[there]}, and its config makes it "
                    f"{tuple(tensor.shape)}"
                )
            names[name] = there
        found.append(names)
    return found


def experts_differ(checkpoints: Sequence[Checkpoint], names: Sequence[dict[str, str]], routed: Sequence[str]) -> None:
    """Any two experts differ in a tensor that is routed; where they do, that is nearly always the first one.

    Raises:
        ValueError: two that do not.
    """
    for one, other in itertools.combinations(range(len(checkpoints)), 2):
        if checkpoints[one].folder.resolve() == checkpoints[other].folder.resolve() or all(
            _equal(checkpoints[one], names[one][name], checkpoints[other], names[other][name]) for name in routed
        ):
            raise ValueError(
                f"{checkpoints[one].folder} and {checkpoints[other].folder} are the same expert twice: a mixture of "
                "them costs more and knows no more. If that is what you want (to branch after upcycling), say "
                "allow_identical: true"
            )


def _equal(one: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    shape = one.shapes[name]
    step = max(1, _ROWS * shape[0] // max(1, torch.Size(shape).numel()))
    for start in range(0, shape[0], step):
        ours, theirs = one.rows(name, start, start + step), other.rows(other_name, start, start + step)
        if not torch.equal(ours.float(), theirs.float()):  # one may be saved in fewer bits
            return False
    return True


def room_for(folder: Path, needed: int) -> None:
    """Raises:
    OSError: less free on the disk of `folder`, which need not exist yet, than `needed` bytes.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: the mixture needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
