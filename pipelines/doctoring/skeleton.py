"""A pipeline or model without its weights: built from its configs on PyTorch's meta device, in seconds at any size.

Where a class cannot be built so (it reads values while it is made), it is loaded. Of a name on the hub, the configs are
taken from the cache, or fetched; never the weights.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins import registry

# the module that knows the folder, what to import from it, and what to do with that
EMBEDDED = {
    "moving_digits": ("attn_plugins.pipelines.demo_model", "load_pipeline", "pipe = load_pipeline()"),
    "small_llama": ("attn_plugins.pipelines.small_llama", "small_llama", "model, tokenizer = small_llama()"),
}


@dataclass
class Skeleton:
    """`obj`: what `patch` takes, a pipeline or a model. `pipe`: the pipeline, if it is one.

    code: lines of Python that load the real one. name: of its variable in them. written_by: library and version that
    saved the files. notes: what could not be done without weights.
    """

    obj: Any
    code: tuple[str, ...]
    name: str
    pipe: Any = None
    written_by: str = ""
    notes: list[str] = field(default_factory=list)


def skeleton(model: str | Path) -> Skeleton:
    """Of a folder, of an embedded model's name (`EMBEDDED`), or of a name on the hub.

    Raises:
        ValueError: no model there, or a class that this version of its library does not know.
        OSError: a name on the hub whose configs are neither in the cache nor to be had.
    """
    folder, code = _folder(str(model))
    if (folder / "model_index.json").is_file():
        return _pipeline(folder, code)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{folder}: neither model_index.json nor config.json there; give the folder of a diffusers pipeline, or of "
            "a model that save_pretrained wrote"
        )
    told = json.loads(config.read_text(encoding="utf-8"))
    return _diffusers_model(folder, told, code) if "_class_name" in told else _transformers_model(folder, told, code)


def _folder(model: str) -> tuple[Path, tuple[str, ...]]:
    """Where the configs are, and the code that loads an embedded model (of others it follows from what they are)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder, ()
    if model in EMBEDDED:
        module, name, call = EMBEDDED[model]
        return importlib.import_module(module).asset_folder(), (f"from {module} import {name}", call)
    if folder.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise ValueError(f"{model}: no such folder; give one, a name on the hub (owner/name) or {', '.join(EMBEDDED)}")
    return _from_hub(model), ()


def _from_hub(name: str) -> Path:
    """The configs of a hub model: of the cache, else fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ["*.json", "*/*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        raise OSError(
            f"{name}: its configs are not in the cache, and the hub is not to be had ({type(error).__name__}); load it "
            "once online, or give a folder"
        ) from error


def _source(folder: Path) -> str:
    return repr(str(folder))


def _pipeline(folder: Path, code: tuple[str, ...]) -> Skeleton:
    """The pipeline's own class, with the parts that matter here: denoisers, VAE, scheduler. The others are None."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:
        raise ValueError(f"{folder}: diffusers {diffusers.__version__} has no {index['_class_name']}; update it")
    found = Skeleton(None, code, "pipe", written_by=f"diffusers {index.get('_diffusers_version', '?')}")
    known = {name for family in registry.families() if family.library == "diffusers" for name in family.classes}
    parts: dict[str, Any] = {}
    for name, row in index.items():
        if isinstance(row, list):
            library, kind = row
            wanted = library == "diffusers" and (kind in known or name in ("vae", "scheduler"))
            parts[name] = _part(folder / name, kind, found) if wanted else None
        elif not name.startswith("_"):
            parts[name] = row  # a setting of the pipeline's (boundary_ratio)
    found.obj = found.pipe = _assembled(cls, parts, found)
    found.code = code or (
        "from diffusers import DiffusionPipeline", f"pipe = DiffusionPipeline.from_pretrained({_source(folder)})"
    )  # fmt: skip
    return found


def _part(folder: Path, kind: str, found: Skeleton) -> Any:
    import diffusers

    cls = getattr(diffusers, kind, None)
    if cls is None:
        raise ValueError(f"{folder}: diffusers {diffusers.__version__} has no {kind}; update it")
    if not issubclass(cls, torch.nn.Module):
        return cls.from_pretrained(folder, local_files_only=True)
    try:
        config = cls.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            return cls.from_config(config)
    except (NotImplementedError, RuntimeError) as error:
        found.notes.append(f"{kind} cannot be made without its weights ({_line(error)}): it was loaded")
        return cls.from_pretrained(folder, local_files_only=True)


class Parts:
    """What stands for a pipeline whose class does not do without the parts that were left out."""

    def __init__(self, cls: type, components: dict[str, Any]) -> None:
        self.cls = cls
        self.components = components
        self.scheduler = components.get("scheduler")


def _assembled(cls: type, parts: dict[str, Any], found: Skeleton) -> Any:
    try:
        return cls(**parts)
    except Exception as error:  # whatever a constructor does with a part that is None
        found.notes.append(f"{cls.__name__} was not assembled ({_line(error)}): give --grid instead of pixels")
        return Parts(cls, parts)


def _diffusers_model(folder: Path, told: dict[str, Any], code: tuple[str, ...]) -> Skeleton:
    found = Skeleton(None, code, "model", written_by=f"diffusers {told.get('_diffusers_version', '?')}")
    found.obj = _part(folder, told["_class_name"], found)
    name = told["_class_name"]
    found.code = code or (f"from diffusers import {name}", f"model = {name}.from_pretrained({_source(folder)})")
    return found


def _transformers_model(folder: Path, told: dict[str, Any], code: tuple[str, ...]) -> Skeleton:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = [name for name in told.get("architectures") or () if hasattr(transformers, name)]
    cls = getattr(transformers, names[0]) if names else None
    found = Skeleton(None, code, "model", written_by=f"transformers {told.get('transformers_version', '?')}")
    name = cls.__name__ if cls else "AutoModel"
    found.code = code or (f"from transformers import {name}", f"model = {name}.from_pretrained({_source(folder)})")
    try:
        with torch.device("meta"):
            found.obj = cls(config) if cls else transformers.AutoModel.from_config(config)
    except (NotImplementedError, RuntimeError) as error:
        found.notes.append(f"{name} cannot be made without its weights ({_line(error)}): it was loaded")
        found.obj = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    return found


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
