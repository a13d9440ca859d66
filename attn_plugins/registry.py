"""Names to methods and families: the built-in rows, what a person registers, and what other packages announce.

Everything is loaded when it is first asked for, so `import attn_plugins` costs nothing. Other packages announce theirs
as entry points, in the groups "attn_plugins.methods" (a Method class) and "attn_plugins.families" (one or a tuple).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from attn_plugins.method import Method

if TYPE_CHECKING:
    from attn_plugins.patches.family import Family

# name -> "module:class"
BUILTIN_METHODS = {
    "agent": "attn_plugins.methods.agent:Agent",
    "draft": "attn_plugins.methods.draft:Draft",
    "gna": "attn_plugins.methods.gna:GNA",
    "kv_pool": "attn_plugins.methods.kv_pool:KVPool",
    "mip": "attn_plugins.methods.mip.method:MIP",
    "moa": "attn_plugins.methods.moa:MoA",
    "moh": "attn_plugins.methods.moh:MoH",
    "moba": "attn_plugins.methods.moba:MoBA",
    "radial": "attn_plugins.methods.radial:Radial",
    "regions": "attn_plugins.methods.regions.method:Regions",
    "sparge": "attn_plugins.methods.sparge:Sparge",
    "trained_agent": "attn_plugins.methods.trained_agent.method:TrainedAgent",
    "vmoba": "attn_plugins.methods.vmoba:VMoBA",
}
# its modules have each a tuple FAMILIES; one whose library is not installed is left out
FAMILY_PACKAGE = "attn_plugins.patches.families"

M = TypeVar("M", bound=type[Method])
_methods: dict[str, Method] = {}
_families: dict[str, Family] = {}
_loaded: set[str] = set()


@overload
def register_method(cls: M, *, replace: bool = False) -> M: ...
@overload
def register_method(cls: None = None, *, replace: bool = False) -> Any: ...
def register_method(cls: Any = None, *, replace: bool = False) -> Any:
    """Make a Method known by its `name`. A decorator, with or without arguments, or a plain call.

    Raises:
        TypeError: not a complete subclass of Method.
        ValueError: a name that is taken, unless `replace`.
    """
    if cls is None:
        return lambda later: register_method(later, replace=replace)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"register_method takes a subclass of attn_plugins.method.Method, not {cls!r}")
    missing = [field for field in ("name", "title", "kind", "paper", "config_class") if not hasattr(cls, field)]
    if missing:
        raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}: a method needs them all")
    if not replace and (cls.name in _methods or cls.name in BUILTIN_METHODS):
        raise ValueError(f"a method named {cls.name!r} exists; give another name, or replace=True")
    _methods[cls.name] = cls()
    return cls


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Make a Family known by its `name`; it wins over a built-in one that matches the same class.

    Raises:
        TypeError: not a Family.
        ValueError: a name that is taken, unless `replace`.
    """
    from attn_plugins.patches.family import Family

    if not isinstance(family, Family):
        raise TypeError(f"register_family takes an attn_plugins.patches.family.Family, not {family!r}")
    known = {row.name for row in families()}
    if family.name in known and not replace:
        raise ValueError(f"a family named {family.name!r} exists; give another name, or replace=True")
    _families.pop(family.name, None)
    _families[family.name] = family
    return family


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: unknown; the message gives the nearest names and all of them.
    """
    _load_entry_points("attn_plugins.methods")
    if name not in _methods:
        if name not in BUILTIN_METHODS:
            known = method_names()
            raise ValueError(f"unknown method {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        module, _, attribute = BUILTIN_METHODS[name].partition(":")
        _methods.setdefault(name, getattr(importlib.import_module(module), attribute)())
    return _methods[name]


def method_names() -> list[str]:
    _load_entry_points("attn_plugins.methods")
    return sorted({*BUILTIN_METHODS, *_methods})


def families() -> tuple[Family, ...]:
    """All families whose library is installed, the built-in ones first."""
    if FAMILY_PACKAGE not in _loaded:
        package = importlib.import_module(FAMILY_PACKAGE)
        for row in sorted(pkgutil.iter_modules(package.__path__), key=lambda row: row.name):
            _load_family_module(f"{FAMILY_PACKAGE}.{row.name}")
        _loaded.add(FAMILY_PACKAGE)
    _load_entry_points("attn_plugins.families")
    return tuple(_families.values())


def family_of(model: object) -> Family | None:
    """The family of a model: by its class, then its base classes; the last registered wins."""
    rows = families()[::-1]
    for base in type(model).__mro__:
        for family in rows:
            if base.__name__ in family.classes and family.matches(model):
                return family
    return None


def available() -> dict[str, list[dict[str, Any]]]:
    """What can be asked for, for people: rows of {"methods": ..., "families": ...}."""
    methods = [method(name) for name in method_names()]
    return {
        "methods": [
            {"name": m.name, "title": m.title, "kind": m.kind, "paper": m.paper, "sites": sorted(m.sites)}
            for m in methods
        ],
        "families": [
            {"name": f.name, "title": f.title, "library": f.library, "classes": list(f.classes), "notes": f.notes}
            for f in families()
        ],
    }


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean ...?)", or nothing."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _load_family_module(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("attn_plugins"):
            raise
        return
    for family in getattr(module, "FAMILIES", ()):
        _families.setdefault(family.name, family)


def _load_entry_points(group: str) -> None:
    if group in _loaded:
        return
    _loaded.add(group)
    for entry in importlib.metadata.entry_points(group=group):
        try:
            found = entry.load()
            if group == "attn_plugins.methods":
                register_method(found)
            else:
                for family in found if isinstance(found, (tuple, list)) else (found,):
                    register_family(family)
        except Exception as error:  # another package's fault must not take ours down
            warnings.warn(f"attn_plugins: entry point {entry.name} = {entry.value} was left out: {error}", stacklevel=3)
