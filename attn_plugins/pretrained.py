"""Models that were saved with a method's weights: patched as they were, and filled."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from attn_plugins import weights
from attn_plugins.handle import PatchHandle
from attn_plugins.patching import is_named, patch
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
            chosen = functools.partial(is_named, frozenset(row["sites"]))
            more = {key: row[key] for key in ("dense_steps", "num_steps", "min_tokens") if key in row}
            done.append(patch(target.root, row["method"], layers=chosen, **more, **row["options"]))
            done[-1].load_weights(folder)
    except BaseException:
        for handle in reversed(done):
            handle.remove()
        raise
    return done[-1]


def from_pretrained(folder: str | Path, model_class: Any = None, **options: Any) -> Any:
    """A transformers model that was saved while patched, patched as it was; one line for both.

    Args:
        folder: of `save_pretrained`, or the name of a repository on the Hub.
        model_class: None: the class that was saved.
        options: of the class' own `from_pretrained` (dtype, device_map, ...).

    Returns:
        The model; `attn_plugins.summary(model)` says how it is patched, `unpatch` leaves the dense one.

    Raises:
        FileNotFoundError: a model that was saved without a patch's weights.
    """
    import transformers

    path = Path(folder)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))
    rows = weights.read(path)
    if model_class is None:
        model_class = getattr(transformers, transformers.AutoConfig.from_pretrained(path).architectures[0])
    chatter = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists the method's weights as unexpected: their place is made next
    try:
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    finally:
        transformers.logging.set_verbosity(chatter)
    parts = tuple(f".{row['method']}." for row in rows)
    strange = [name for name in info["unexpected_keys"] if not any(part in f".{name}" for part in parts)]
    for what, names in (("lacks", sorted(info["missing_keys"])), ("has, and the model has not,", sorted(strange))):
        if names:
            warnings.warn(f"attn_plugins: {folder} {what} {', '.join(names)}", stacklevel=2)
    load(model, path)
    return model
