"""Our model types enter transformers' Auto classes when those are imported, and not before.

`import attn_plugins` has to stay cheap and brings no transformers along; and it nearly always stands above
`from transformers import AutoModelForCausalLM`, as isort wants it. So unless transformers is there already, a finder
waits at the head of `sys.meta_path` for the two modules of the Auto classes, registers after they have run, and leaves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGS, MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
# The file of a dense config imports the Auto classes, if it is what is imported first: it has no class yet then.
ONE_CONFIG = "transformers.models.", ".configuration_"


def register() -> None:
    """Our config classes into AutoConfig; twice is once. Model classes follow with a first config, so that nobody pays
    for the import of modelings that are not used. Called by itself.
    """
    from attn_plugins.models.bam import config

    config.register()


def when_transformers_comes() -> None:
    """`register` now if AutoConfig is there, else right after it is imported."""
    if any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        return
    if CONFIGS in sys.modules:
        _register_or_warn()
    else:
        sys.meta_path.insert(0, _Waiting())


def _register_or_warn() -> None:
    """Inside somebody's import of transformers, which has to succeed whatever is wrong with ours."""
    try:
        register()
    except Exception as error:
        warnings.warn(f"attn_plugins: the model types of BAM are not registered: {error}", stacklevel=2)


class _Waiting(MetaPathFinder):
    def __init__(self) -> None:
        self.asking = False
        self.running: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.asking or not (name in (CONFIGS, MODELS) or name.startswith(ONE_CONFIG[0]) and ONE_CONFIG[1] in name):
            return None
        self.asking = True  # the next line asks all finders
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec

    def imported(self) -> None:
        """One of them has run. Configs of transformers read tables of the others, and ours are made of theirs: none may
        be half done."""
        if self in sys.meta_path and CONFIGS in sys.modules and not self.running:
            sys.meta_path.remove(self)
            _register_or_warn()


class _Then(Loader):
    """The module's own loader, which is in its place again when it has run."""

    def __init__(self, loader: Any, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_source, get_filename, ...

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.waiting.running.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            self.waiting.running.discard(module.__name__)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.waiting.imported()
