"""What is measured on a GPU: a file per operator, each with a tuple CASES. A new file is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.gpu_suite.case import Case


def all_cases() -> tuple[Case, ...]:
    """The cases of every file in this folder.

    Raises:
        ValueError: two cases of one name.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    cases = tuple(case for module in modules for case in getattr(module, "CASES", ()))
    seen: set[str] = set()
    for case in cases:
        if case.name in seen:
            raise ValueError(f"two cases are called {case.name!r}: rows are told apart by that name")
        seen.add(case.name)
    return cases


def chosen(cases: tuple[Case, ...], only: list[str], quick: bool) -> tuple[Case, ...]:
    """Those whose name or suite begins with one of `only`; of all, or of the quick ones.

    Raises:
        ValueError: an entry of `only` that no case begins with.
    """
    for start in only:
        if not any(name.startswith(start) for case in cases for name in (case.name, case.suite)):
            raise ValueError(f"--only {start}: no case begins so; there are {', '.join(case.name for case in cases)}")
    return tuple(
        case
        for case in cases
        if (case.quick or not quick or only) and (not only or case.name.startswith(tuple(only)) or case.suite in only)
    )
