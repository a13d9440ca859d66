"""Attention methods as plugins for models that are already loaded: `patch(pipe, "gna")`, `unpatch(pipe)`."""

# In a source checkout patches/, pipelines/ and configs/ stand beside the package; installed, they lie inside it.
import importlib as _importlib
import pathlib as _pathlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

_root = _pathlib.Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "patches" / "__init__.py").is_file():
    __path__.append(str(_root))

from attn_plugins.models import registration as _registration  # noqa: E402  # the path above is where a checkout has more

_registration.when_transformers_comes()

if _TYPE_CHECKING:
    from attn_plugins.patching import PatchHandle, patch, patched, summary, unpatch
    from attn_plugins.plan.simulator import simulate
    from attn_plugins.pretrained import from_pretrained, load, load_adapter
    from attn_plugins.registry import available, register_family, register_method

__version__ = "0.1.0"
__all__ = [
    "PatchHandle",
    "available",
    "from_pretrained",
    "load",
    "load_adapter",
    "patch",
    "patched",
    "register_family",
    "register_method",
    "simulate",
    "summary",
    "unpatch",
]
_HOMES = {
    "attn_plugins.pretrained": ("from_pretrained", "load", "load_adapter"),
    "attn_plugins.plan.simulator": ("simulate",),
    "attn_plugins.registry": ("available", "register_family", "register_method"),
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used: the patcher brings PyTorch's compiler and Triton along."""
    if name not in __all__:
        raise AttributeError(f"module 'attn_plugins' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = next((home for home, names in _HOMES.items() if name in names), "attn_plugins.patching")
    globals()[name] = getattr(_importlib.import_module(home), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
