"""A model by its folder, by the name of an embedded one, or by its name on the hub; what it is its files say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["pipeline", "language", "classifier"]
TITLES = {"pipeline": "diffusers pipeline", "language": "language model", "classifier": "image classifier"}
PIPELINE, CONFIG = "model_index.json", "config.json"
EMBEDDED = {"moving_digits": "pipeline", "small_llama": "language"}
ARCHITECTURES = {"ForCausalLM": "language", "LMHeadModel": "language", "ForImageClassification": "classifier"}


@dataclass(frozen=True)
class Place:
    """`source`: a folder, or a name on the hub. `embedded`: one of EMBEDDED, or "". `name`: for files and titles."""

    kind: Kind
    source: str
    name: str
    embedded: str = ""


@dataclass(frozen=True)
class Loaded:
    """`obj`: a pipeline or a model, on its device. `reader`: a language model's tokenizer; of a classifier its
    preprocessor's settings."""

    place: Place
    obj: Any
    reader: Any = None


def locate(model: str) -> Place:
    """What `model` is, by its files; nothing of it is loaded yet.

    Raises:
        ValueError: neither a folder nor an embedded model, and not on the hub or the hub cannot be reached; or a
            model of another kind.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        for name in EMBEDDED:
            if folder.resolve() == _embedded(name).resolve():
                return locate(name)
        files = [file for file in (PIPELINE, CONFIG) if (folder / file).is_file()]
        if not files:
            raise ValueError(f"{model}: neither {PIPELINE} nor {CONFIG} there; give the folder of a saved model")
        return Place(_kind(model, folder / files[0]), str(folder), folder.resolve().name)
    if model in EMBEDDED:
        place = _embedded(model)
        kind: Kind = "pipeline" if EMBEDDED[model] == "pipeline" else "language"
        return Place(kind, str(place), model, model)
    if folder.exists() or model.count("/") > 1 or model.startswith((".", "~", "/")):
        raise ValueError(f"{model}: no such folder; give a saved model's, or {', '.join(EMBEDDED)}")
    return Place(_kind(model, _on_the_hub(model)), model, model.split("/")[-1])


def load(place: Place, device: str | None = None, dtype: str | None = None) -> Loaded:
    """The model, in evaluation mode.

    Args:
        device: None: cuda where there is one, else cpu. dtype: None: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: an unknown dtype.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = checked_dtype(dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16"))
    local: dict[str, Any] = {"local_files_only": True} if Path(place.source).is_dir() else {}
    if place.embedded == "moving_digits":
        from attn_plugins.pipelines.demo_model import load_pipeline

        return Loaded(place, load_pipeline(kind).to(device))
    if place.kind == "pipeline":
        from diffusers import DiffusionPipeline

        return Loaded(place, DiffusionPipeline.from_pretrained(place.source, torch_dtype=kind, **local).to(device))
    import transformers

    if place.kind == "language":
        model = transformers.AutoModelForCausalLM.from_pretrained(place.source, dtype=kind, **local)
        reader: Any = transformers.AutoTokenizer.from_pretrained(place.source, **local)
    else:
        model = transformers.AutoModelForImageClassification.from_pretrained(place.source, dtype=kind, **local)
        reader = _preprocessor(place)
    return Loaded(place, model.eval().to(device), reader)


def checked_dtype(name: str) -> Any:
    """Raises ValueError for a name that is no float type of PyTorch."""
    import torch

    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"--dtype {name}: give float32, bfloat16 or float16")
    return kind


def _embedded(name: str) -> Path:
    from attn_plugins.pipelines import demo_model, small_llama

    return demo_model.asset_folder() if name == "moving_digits" else small_llama.asset_folder()


def _kind(model: str, file: Path) -> Kind:
    """What a model is, by its model_index.json or config.json."""
    if file.name == PIPELINE:
        return "pipeline"
    config = _json(file)
    if "_class_name" in config:
        raise ValueError(
            f"{model} is a {config['_class_name']} by itself: compare runs whole pipelines; give the folder of one, "
            f"with {PIPELINE}"
        )
    names = config.get("architectures") or []
    for name in names:
        for ending, kind in ARCHITECTURES.items():
            if name.endswith(ending):
                return "language" if kind == "language" else "classifier"
    raise ValueError(
        f"{model} is {', '.join(names) or 'a model that names no architecture'}: compare knows diffusers pipelines and "
        f"models of transformers whose architecture ends in {', '.join(ARCHITECTURES)}"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no mapping")
    return found


def _on_the_hub(model: str) -> Path:
    """The file that tells what a model on the hub is, fetched or from the cache.

    Raises:
        ValueError: no such model, no hub, or a model without either file.
    """
    what = f"{model} is no folder here, and none of the embedded models ({', '.join(EMBEDDED)})"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(f"{what}; names on the hub need huggingface_hub") from error
    reason = ""
    for file in (PIPELINE, CONFIG):
        try:
            return Path(hf_hub_download(model, file))
        except LocalEntryNotFoundError:
            reason = "the hub cannot be reached (or HF_HUB_OFFLINE is set), and it is not in the cache"
        except EntryNotFoundError:
            reason = reason or f"on the hub it has neither {PIPELINE} nor {CONFIG}"
        except (OSError, ValueError) as error:  # no such repository, a gated one, a name that cannot be one
            reason = " ".join(str(error).split()).split(". ")[0]
            break
    raise ValueError(f"{what}; {reason}")


def _preprocessor(place: Place) -> dict[str, Any]:
    """preprocessor_config.json, if there is one."""
    name = "preprocessor_config.json"
    if Path(place.source).is_dir():
        file = Path(place.source) / name
        return _json(file) if file.is_file() else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _json(Path(hf_hub_download(place.source, name)))
    except EntryNotFoundError:
        return {}
