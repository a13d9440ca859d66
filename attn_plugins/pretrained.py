"""Models that were saved with a method's weights: patched as they were, and filled."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from attn_plugins import record, registry, weights
from attn_plugins.handle import PatchHandle
from attn_plugins.patching import patch_as_saved
from attn_plugins.targets import find


def load(obj: object, folder: str | Path) -> PatchHandle:
    """Patch a model as the weights in `folder` were saved, and fill them.

    Args:
        obj: the dense model that they belong to.
        folder: of `handle.save_weights`, or of `save_pretrained` of a patched model.

    Returns:
        The handle of the (last) patch.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a model of another family or with other layers than they were saved from.
    """
    target, *others = find(obj)
    if others:
        names = ", ".join(type(one.root).__name__ for one in (target, *others))
        raise ValueError(f"weights are of one model, and this has several ({names}): give the one they belong to")
    rows = weights.read(folder)
    for row in rows:
        if row["family"] != target.family.name:
            raise ValueError(
                f"{folder} is of models of {row['family']!r}; {type(target.root).__name__} is of {target.family.name!r}"
            )
        missing = set(row["sites"]) - {site.name for site in target.family.find_sites(target.root)}
        if missing:
            raise ValueError(
                f"{type(target.root).__name__} has no layer {min(missing)!r}, of which {folder} has weights"
            )
    config = getattr(target.root, "config", None)
    if config is not None:
        weights.forget(config, rows)  # a model saved with them says so, but is not patched yet
    done: list[PatchHandle] = []
    try:
        for row in rows:
            done.append(patch_as_saved(target.root, row))
            done[-1].load_weights(folder)
    except BaseException:
        for handle in reversed(done):
            handle.remove()
        raise
    return done[-1]


def from_pretrained(folder: str | Path, model_class: Any = None, **options: Any) -> Any:
    """A model that was saved while patched, patched as it was; one line for both.

    Args:
        folder: of `save_pretrained` of a model of transformers or diffusers, or the name of a repository on the Hub.
        model_class: None: the class that was saved.
        options: of the class' own `from_pretrained` (dtype, device_map, ...).

    Returns:
        The model; `attn_plugins.summary(model)` says how it is patched, `unpatch` leaves the dense one.

    Raises:
        FileNotFoundError: a model that was saved without a patch's weights.
    """
    path = Path(folder)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))
    rows = weights.read(path)
    library, saved_class = _saved_class(path)
    chatter = library.get_verbosity()
    library.set_verbosity_error()  # it lists the method's weights as unexpected: their place is made next
    try:
        model, info = (model_class or saved_class).from_pretrained(path, output_loading_info=True, **options)
    finally:
        library.set_verbosity(chatter)
    parts = tuple(f".{row['method']}." for row in rows)
    strange = [name for name in info["unexpected_keys"] if not any(part in f".{name}" for part in parts)]
    for what, names in (("lacks", sorted(info["missing_keys"])), ("has, and the model has not,", sorted(strange))):
        if names:
            warnings.warn(f"attn_plugins: {folder} {what} {', '.join(names)}", stacklevel=2)
    load(model, path)
    return model


def _saved_class(path: Path) -> tuple[Any, Any]:
    """(the library's logging, the class of the model in a folder)."""
    name = json.loads((path / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name is not None:
        import diffusers
        from diffusers.utils import logging

        return logging, getattr(diffusers, name)
    import transformers

    return transformers.logging, getattr(transformers, transformers.AutoConfig.from_pretrained(path).architectures[0])


def load_adapter(model: Any, folder: str | Path, **options: Any) -> Any:
    """PEFT's adapter on a model whose method has weights, strictly: PEFT by itself drops, without a word, what it has
    of a method that the model is not patched with, and the model runs dense.

    Args:
        model: the base of the adapter. If `handle.save_weights(folder)` wrote into the folder too, it is patched as
            that says; else patch it first, with the settings that the adapter was trained with.
        folder: of the adapter's `save_pretrained`.
        options: of `PeftModel.from_pretrained`.

    Returns:
        The PeftModel.

    Raises:
        ValueError: weights in the adapter that the model has no place for, or of another shape.
        FileNotFoundError: no adapter there.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: it has no adapter_config.json")
    if (Path(folder) / weights.FILES[1]).is_file() and not any(record.patches_of(one.root) for one in find(model)):
        load(model, folder)
    held = {name: tensor.shape for name, tensor in model.state_dict().items()}
    saved = {name.removeprefix("base_model.model."): t.shape for name, t in load_peft_weights(str(folder)).items()}
    bring = [name for name in registry.method_names() if registry.method(name).kind == "module"]
    ours = {name: method for name in saved for method in bring if f".{method}." in name}
    modules = {name.rpartition(".")[0] for name in held}
    strange = [
        name
        for name in ours
        if (name.partition(".lora_")[0] not in modules if ".lora_" in name else held.get(name) != saved[name])
    ]
    if strange:
        method = ours[strange[0]]
        raise ValueError(
            f"{folder} has {len(strange)} tensors of {method!r} that {type(model).__name__} has no place for "
            f"({strange[0]}, ...): call attn_plugins.patch(model, {method!r}, ...) with the settings that the adapter "
            "was trained with, before it is loaded"
        )
    return PeftModel.from_pretrained(model, folder, **options)
