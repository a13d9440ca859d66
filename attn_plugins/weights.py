"""The weights of a method on a model: children of the patched layers, an entry in the model's config, files.

They are parameters of the model as any other: in its state dict, moved and cast with it, seen by optimizers, saved by
`save_pretrained`, beside an entry `attn_plugins` of its config that says what they belong to. `unpatch` takes them out.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_plugins import recipe
from attn_plugins.method import Method, MethodConfig, SiteShape
from attn_plugins.patches.family import Family, Site
from attn_plugins.record import Patched
from attn_plugins.runtime import Layer

CONFIG = "attn_plugins"  # the entry in a model's config, and the name of the files
FILES = f"{CONFIG}.safetensors", f"{CONFIG}.json"
Make = Callable[[], "nn.Module | None"]


def shapes(method: Method, family: Family, root: nn.Module, sites: list[Site]) -> dict[str, SiteShape]:
    """What the weights of each site must be made for, by its name: {} of a method that is not of kind "module".

    Raises:
        ValueError: a model that cannot say.
    """
    if method.kind != "module":
        return {}
    found: dict[str, SiteShape] = {}
    for site in sites:
        shape = None if family.shape is None else family.shape(root, site.module)
        why: object = shape
        if isinstance(shape, SiteShape):
            why = shape.grid if method.needs_grid else ()
        if why is None or isinstance(why, str):
            why = why or f"{family.title} does not tell the sizes of its attention layers"
            raise ValueError(f"{method.name!r} brings weights for each layer: {why}")
        assert isinstance(shape, SiteShape)  # or there was a reason
        found[site.name] = shape
    return found


def of_sites(
    method: Method, config: MethodConfig, sites: list[Site], shapes: Mapping[str, SiteShape]
) -> dict[str, Make]:
    """What makes the weights of each site, by its name: {} of a method that has no `shapes`."""
    return {
        site.name: functools.partial(method.weights, config, shapes[site.name], site.index) for site in sites if shapes
    }


def attach(root: nn.Module, patched: Patched, made: Mapping[str, Make]) -> None:
    """Put new weights, if there are any, on the layers named in `made`; what takes them out again joins `patched.undo`
    step by step.

    Raises:
        ValueError: a layer that has something of that name.
    """
    if not made:
        return
    for layer in patched.layers:
        module, name = root.get_submodule(layer.name), patched.method
        if hasattr(module, name):
            raise ValueError(
                f"{layer.name} has an attribute {name!r} already: the method's weights have no place there"
            )
        with torch.device("cpu"):  # whatever the default device is: they are drawn there
            like, weights = _like(module, root), made[layer.name]()
        if weights is None:
            continue
        weights = weights.to(device=like.device, dtype=like.dtype).train(module.training)
        layer.weights = name
        module.add_module(name, weights)
        patched.undo.append(functools.partial(_detach, module, name))
    config = getattr(root, "config", None)
    if config is not None and patched.kept:
        row, rows = recipe.row(patched), noted(config)
        _note(config, [*rows, *([] if row in rows else [row])])
        patched.undo.append(functools.partial(forget, config, [row]))


def named_weights(root: nn.Module, patched: Patched) -> Iterator[tuple[str, nn.Parameter]]:
    """Names as in the model's state dict, PEFT's wrapper around them left out."""
    for layer, weights in modules(root, patched):
        for name, parameter in weights.named_parameters():
            yield f"{layer.name}.{layer.weights}.{name}", parameter


def modules(root: nn.Module, patched: Patched) -> Iterator[tuple[Layer, nn.Module]]:
    """The layers that have weights, and the module of these that runs."""
    for layer in patched.layers:
        weights = layer.weights_of(root.get_submodule(layer.name))
        if weights is not None:
            yield layer, _unwrapped(weights)


def save(root: nn.Module, patched: Patched, folder: str | Path) -> Path:
    """Write the weights alone, and what they belong to, as `attn_plugins.safetensors` and `attn_plugins.json`.

    Raises:
        ValueError: a method without weights.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{layer.name}.{layer.weights}.{name}": tensor.detach().contiguous()
        for layer, weights in modules(root, patched)
        for name, tensor in _own_state(weights).items()  # buffers too
    }
    if not tensors and not patched.kept:
        raise ValueError(f"method {patched.method!r} has no weights to save: handle.save(path) writes a recipe")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILES[0], metadata={"format": "pt"})
    (folder / FILES[1]).write_text(json.dumps([recipe.row(patched)], indent=1) + "\n", encoding="utf-8")
    return folder


def read(folder: str | Path) -> list[dict[str, Any]]:
    """What the weights in a folder belong to, a recipe each: of `save`, or of `save_pretrained` of a patched model.

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = Path(folder)
    if (folder / FILES[1]).is_file():
        return json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    config = folder / "config.json"
    rows = json.loads(config.read_text(encoding="utf-8")).get(CONFIG) if config.is_file() else None
    if not rows:
        raise FileNotFoundError(
            f"{folder} holds no weights of a method: handle.save_weights(folder) or save_pretrained of a patched model "
            f"writes {FILES[1]}, or an entry {CONFIG!r} of config.json"
        )
    return rows


def load(root: nn.Module, patched: Patched, folder: str | Path) -> None:
    """Fill the weights of a patched model from a folder, all of them and nothing else.

    Raises:
        ValueError: tensors that are missing, or that the patch has no place for; the message names some; or of another
            setting, with which the same tensors mean something else.
    """
    saved = _tensors(Path(folder), patched.method)
    wanted: dict[str, set[str]] = {layer.name: set() for layer in patched.layers}
    for one, weights in modules(root, patched):
        wanted[one.name] = set(_own_state(weights))
    rows = [set(row["sites"]) for row in read(folder) if row["method"] == patched.method]
    mine = set[str]().union(*(sites for sites in rows if sites & wanted.keys()))
    there = _paired(sorted(wanted.keys() | set[str]().union(*rows)), list(saved))
    found = {layer: set(saved.get(there[layer], {})) for layer in wanted}
    lacks = [f"{layer}: {own}" for layer in wanted for own in sorted(wanted[layer] - found[layer])]
    extra = [f"{layer}: {own}" for layer in wanted for own in sorted(found[layer] - wanted[layer])]
    extra += sorted(mine - wanted.keys()) + sorted(saved.keys() - set(there.values()))
    if lacks or extra:
        raise ValueError(
            f"{folder} is not of this patch: it lacks {len(lacks)} tensors{_such_as(lacks)} and has {len(extra)} that "
            f"the patch has not{_such_as(extra)}. attn_plugins.load patches with the settings that were saved"
        )
    for row in read(folder):
        if row["method"] == patched.method and set(row["sites"]) & wanted.keys():
            _same_setting(folder, patched.config, type(patched.config).from_options(**row["options"]))
    for one, weights in modules(root, patched):
        given, names = saved[there[one.name]], _own_names(weights)
        weights.load_state_dict({names[own]: given[own] for own in names}, strict=False)  # a LoRA's are not there


def _tensors(folder: Path, method: str) -> dict[str, dict[str, torch.Tensor]]:
    """The method's tensors in a folder, by layer; the other tensors of a model's files are not read."""
    from safetensors import safe_open

    own = folder / FILES[0]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in [own] if own.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                layer, between, rest = name.partition(f".{method}.")
                if between:
                    found.setdefault(layer, {})[rest] = tensors.get_tensor(name)
    return found


def _paired(layers: list[str], saved: list[str]) -> dict[str, str]:
    """A model's layers -> their names in a file, which transformers may write otherwise ("layers.3" as "layer.3"): then
    by the numbers in them, as far as those tell layers apart."""
    if set(layers) & set(saved):
        return {layer: layer for layer in layers}
    by_numbers = {_numbers(name): name for name in saved}
    if len(by_numbers) < len(saved) or len({_numbers(layer) for layer in layers}) < len(layers):
        return {layer: layer for layer in layers}
    return {layer: by_numbers.get(_numbers(layer), layer) for layer in layers}


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _unwrapped(weights: nn.Module) -> nn.Module:
    """The weights that run, of PEFT's `modules_to_save`: its wrapper keeps those from before beside them."""
    copies = getattr(weights, "modules_to_save", None)
    if copies is None or not hasattr(weights, "original_module"):
        return weights
    active = getattr(weights, "active_adapters", None) or [weights.active_adapter]
    return next((copies[name] for name in active if name in copies), weights.original_module)  # type: ignore[return-value]


def _same_setting(folder: str | Path, mine: MethodConfig, saved: MethodConfig) -> None:
    for name in mine.binding:
        if getattr(mine, name) != getattr(saved, name):
            raise ValueError(
                f"{folder} is of {name}={getattr(saved, name)!r}, the patch of {name}={getattr(mine, name)!r}: "
                "attn_plugins.load patches with the settings that were saved"
            )


def _own_names(weights: nn.Module) -> dict[str, str]:
    """The names that the weights' tensors have by themselves -> those in the state dict: PEFT puts linear layers under
    `base_layer`, and beside them what is the adapter's, and is left out here."""
    names = list(weights.state_dict())
    around = {name.partition("base_layer.")[0] for name in names if ".base_layer." in f".{name}"}
    own = [name for name in names if "base_layer." in name or not any(name.startswith(part) for part in around)]
    return {name.replace("base_layer.", ""): name for name in own}


def _own_state(weights: nn.Module) -> dict[str, torch.Tensor]:
    state = weights.state_dict()
    return {own: state[name] for own, name in _own_names(weights).items()}


def _such_as(names: list[str]) -> str:
    return f" ({names[0]}, ...)" if names else ""


def _like(module: nn.Module, root: nn.Module) -> torch.Tensor:
    """A parameter in the precision that the layer computes in: quantised weights are no floating numbers."""
    parameters = (p for part in (module, root) for p in part.parameters() if p.is_floating_point())
    return next(parameters, torch.empty(0))


def _detach(module: nn.Module, name: str) -> None:
    module._modules.pop(name, None)


def noted(config: Any) -> list[dict[str, Any]]:
    """The rows of the entry in a model's config."""
    return list((config.get(CONFIG) if isinstance(config, OrderedDict) else getattr(config, CONFIG, None)) or [])


def forget(config: Any, rows: list[dict[str, Any]]) -> None:
    """Take rows out of the entry in a model's config; without any the entry goes."""
    _note(config, [row for row in noted(config) if row not in rows])


def _note(config: Any, rows: list[dict[str, Any]]) -> None:
    config.__dict__.pop(CONFIG, None)
    if isinstance(config, OrderedDict):  # of diffusers, and frozen against its own methods
        if rows:
            OrderedDict.__setitem__(config, CONFIG, rows)
        elif CONFIG in config:
            OrderedDict.__delitem__(config, CONFIG)
    elif rows:
        setattr(config, CONFIG, rows)
