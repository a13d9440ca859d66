"""Everything about a model, its modules and the libraries around it that a patch could leave a trace in."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_LIBRARY_MODULES = (
    "torch.nn.functional",
    "diffusers.models.attention_dispatch",
    "diffusers.models.attention_processor",
    "diffusers.models.attention",
    "diffusers.hooks._helpers",
    "transformers.modeling_utils",
)


def snapshot(root: nn.Module) -> dict[str, Any]:
    """Comparable with `==`: identities and classes of all modules, attributes, hooks and processors, and of globals."""
    rows: dict[str, Any] = {}
    for name, module in root.named_modules():
        rows[name] = (id(module), type(module), _shallow(module.__dict__))
        processor = module.__dict__.get("processor")
        if processor is not None:
            rows[f"{name}.processor"] = (id(processor), type(processor), _shallow(vars(processor)))
    modules = {type(module).__module__ for module in root.modules()} | set(_LIBRARY_MODULES)
    for name in sorted(modules):
        if name in sys.modules:
            rows[f"globals of {name}"] = {key: id(value) for key, value in vars(sys.modules[name]).items()}
    return rows


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """Names and identities; hooks and other dicts by their contents, which is where a trace would be. Lists by their
    contents alone: a model may make one anew in each forward (Qwen-Image 2.1)."""

    def row(value: Any) -> Any:
        if isinstance(value, (int, float, str)):
            return value
        if isinstance(value, dict):
            return id(value), {k: id(v) for k, v in value.items()}
        return [id(v) for v in value] if type(value) is list else id(value)

    return {key: row(value) for key, value in attributes.items()}
