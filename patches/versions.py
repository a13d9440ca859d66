"""Versions of the libraries that the families were tested with, and one warning outside of them."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import PackageNotFoundError, version

# Oldest and newest, as (major, minor). diffusers: tests/patches/test_matrix.py passed with 0.38, 0.40 and 0.42, but for
# classes that the older ones lack. transformers: with 5.23; with 5.12 but for DINOv2, Depth Anything and Nemotron.
TESTED = {"diffusers": ((0, 38), (0, 42)), "transformers": ((5, 23), (5, 23))}


@functools.cache
def warn_if_untested(library: str) -> None:
    """Warn once in a process if the installed `library` is outside its tested range; nothing if it is unknown."""
    try:
        installed = version(library)
        numbers = tuple(int(part) for part in installed.split(".")[:2])
        oldest, newest = TESTED[library]
    except (PackageNotFoundError, ValueError, KeyError):
        return
    if not oldest <= numbers <= newest:
        span = " to ".join(f"{major}.{minor}" for major, minor in dict.fromkeys((oldest, newest)))
        warnings.warn(
            f"attn_plugins: {library} {installed} is installed; the families were tested with {span}. They may still "
            "work: compare an output under a setting that covers everything (window=-1), or install a tested version",
            stacklevel=3,
        )
