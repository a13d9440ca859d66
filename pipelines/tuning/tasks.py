"""The tasks that examples offer: a model of one's own by its folder or hub name, or a small one that is here."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_plugins.training.classifying import muon, small_vit
from attn_plugins.training.loop import LoopSettings, adamw
from attn_plugins.training.pictures import DigitPictures, PictureData, PictureFolder
from attn_plugins.training.processes import by_main
from attn_plugins.training.small_llama.domains import DOMAINS
from attn_plugins.training.tasks import Task, train_task
from attn_plugins.training.tasks.classes import ClassesTask
from attn_plugins.training.tasks.denoising import DenoisingTask, vae_encoder
from attn_plugins.training.tasks.text import TextTask
from attn_plugins.training.trainable import make_trainable

KINDS = ("language", "vit", "dit")
SMALL_SIZE = {"vit": 112, "dit": 64}  # px, of the small models' pictures
SMALL_DIT: dict[str, Any] = {
    "num_attention_heads": 8, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "num_layers": 4,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip


def task_of(
    kind: str,
    model: str | None,
    data: Sequence[Path],
    *,
    length: int,
    held_out: int,
    size: int | None,
    start: Callable[[Task], Callable[[], Any]],
) -> Task:
    """A task of one of `KINDS`.

    Args:
        model: folder or hub name; None: the embedded language model, or a small one that `start` trains first.
        data: text files, or one folder of folders of pictures; none: Python's own texts, or handwritten digits.
        length: of rows of text, tokens. size: of pictures, px; None: the small model's, else 224 (a DiT's: 256).
        start: trains the small model of a task whose `load` gives it new, and returns what loads it.

    Raises:
        ValueError: another kind, or several folders of pictures.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: legal are {', '.join(map(repr, KINDS))}")
    if kind == "language":
        return _language(model, data, length, held_out)
    if len(data) > 1:
        raise ValueError(f"{len(data)} folders of pictures: give one, of folders of pictures, a class each")
    size = size or (SMALL_SIZE[kind] if model is None else {"vit": 224, "dit": 256}[kind])
    pictures: PictureData = PictureFolder(data[0], size) if data else DigitPictures(size)
    return _vit(model, pictures, size, start) if kind == "vit" else _dit(model, pictures, start)


def domains_of(
    model: str | None, domains: Mapping[str, Sequence[Path]], *, length: int, held_out: int
) -> dict[str, Task]:
    """Tasks of one language model on texts of several domains: text files by name; none: Python's code and prose.

    Raises:
        ValueError: one domain alone, or one without files.
    """
    load, tokenizer = _language_model(model)
    if not domains:
        return {name: TextTask.of_domain(load, tokenizer, name, length, held_out) for name in DOMAINS}
    empty = [name for name, files in domains.items() if not files]
    if empty or len(domains) < 2:
        raise ValueError(f"domains {list(domains)}, without files {empty}: give two or more, each with text files")
    return {name: TextTask.of_files(load, tokenizer, files, length, held_out) for name, files in domains.items()}


def _language_model(model: str | None) -> tuple[Callable[[], Any], Any]:
    """What loads it, and its tokenizer; None: the embedded one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attn_plugins.pipelines.small_llama import asset_folder, small_llama

    if model is None:
        return lambda: small_llama()[0], AutoTokenizer.from_pretrained(asset_folder())
    return functools.partial(AutoModelForCausalLM.from_pretrained, model), AutoTokenizer.from_pretrained(model)


def _language(model: str | None, data: Sequence[Path], length: int, windows: int) -> Task:
    load, tokenizer = _language_model(model)
    if data:
        return TextTask.of_files(load, tokenizer, data, length, windows)
    return TextTask.of_python(load, tokenizer, length, windows)


def _vit(model: str | None, pictures: PictureData, size: int, start: Callable[[Task], Callable[[], Any]]) -> Task:
    if model is not None:
        from transformers import AutoModelForImageClassification

        return ClassesTask(functools.partial(AutoModelForImageClassification.from_pretrained, model), pictures)
    return ClassesTask(start(ClassesTask(lambda: small_vit(pictures, size), pictures)), pictures)


def _dit(model: str | None, pictures: PictureData, start: Callable[[Task], Callable[[], Any]]) -> Task:
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    if model is None:
        return DenoisingTask(start(DenoisingTask(_small_dit, pictures)), pictures)
    if not (Path(model) / "model_index.json").is_file() and (Path(model) / "config.json").is_file():
        return DenoisingTask(functools.partial(DiTTransformer2DModel.from_pretrained, model), pictures)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    load = functools.partial(DiTTransformer2DModel.from_pretrained, model, subfolder="transformer")
    return DenoisingTask(load, pictures, vae_encoder(vae))


def _small_dit() -> Any:
    import torch
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiTTransformer2DModel(**SMALL_DIT)


def trained_start(accelerator: Any, folder: Path, settings: LoopSettings) -> Callable[[Task], Callable[[], Any]]:
    """Gives `task_of` its `start`: the small dense model is trained in `folder`, unless it lies there already."""

    def start(task: Task) -> Callable[[], Any]:
        model = task.load()
        if not (folder / "config.json").is_file():
            model.to(accelerator.device)
            make_trainable(model)
            rule = muon if hasattr(model, "vit") else adamw
            parts = accelerator, model, task, settings, folder / "checkpoint"
            train_task(*parts, resume=True, title="dense start", optimizers=rule)
            by_main(accelerator, lambda: model.save_pretrained(folder))
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if told.get("attn_plugins"):
            raise ValueError(f"{folder} holds a patched model: give another --out")
        trained = type(model).from_pretrained(folder)
        return lambda: copy.deepcopy(trained)

    return start
