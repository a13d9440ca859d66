"""Which sites of a model a patch takes: by the method's kinds, and by the person's `layers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from attn_plugins.method import Method
from attn_plugins.patches.family import Family, Site

_RANGES = re.compile(r"\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*")


def select(method: Method, family: Family, sites: list[Site], layers: Any) -> tuple[list[Site], list[tuple[str, str]]]:
    """(the sites to patch, (name, why not) of the others).

    Args:
        layers: None (all), an int or several (indices among the sites of the kind, from 0; negative from the end), a
            string of ranges with both ends in ("4-20", "0,2,8-11"), any other string (a regular expression searched for
            in the site's name), or a callable that is given the `Site`.

    Raises:
        ValueError: no site is left, an index that does not exist, or a bad regular expression.
        TypeError: `layers` is something else.
    """
    fitting = [site for site in sites if site.kind in method.sites]
    skipped = [(site.name, f"a site of kind {site.kind!r}") for site in sites if site.kind not in method.sites]
    if not fitting:
        kinds = sorted({site.kind for site in sites})
        raise ValueError(
            f"method {method.name!r} is for attention of kind {', '.join(sorted(method.sites))}, "
            f"and this {family.title} has {', '.join(kinds) or 'no attention that its family knows'}: zero sites"
        )
    wanted = _chooser(layers, 1 + max(site.index for site in fitting))
    chosen = [site for site in fitting if wanted(site)]
    skipped += [(site.name, "not among layers=...") for site in fitting if not wanted(site)]
    if not chosen:
        raise ValueError(
            f"layers={layers!r} leaves zero sites of {len(fitting)}; names are like {fitting[0].name!r}, "
            f"indices 0..{fitting[-1].index}"
        )
    return chosen, skipped


def _chooser(layers: Any, count: int) -> Callable[[Site], bool]:
    if layers is None:
        return lambda site: True
    if callable(layers):
        return lambda site: bool(layers(site))
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if isinstance(layers, str):
        if not _RANGES.fullmatch(layers):
            return _by_name(layers)
        layers = _ranges(layers)
    if isinstance(layers, Collection) and all(isinstance(index, int) for index in layers):
        indices = {index + count if index < 0 else index for index in layers}
        outside = sorted(index for index in layers if not -count <= index < count)
        if outside:
            raise ValueError(f"layers={outside}: there are {count} of them, indices 0..{count - 1} (or negative)")
        return lambda site: site.index in indices
    raise TypeError(
        f"layers={layers!r}: give indices, ranges in a string ('4-20'), a regular expression on names, or a callable"
    )


def _ranges(text: str) -> list[int]:
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices


def _by_name(pattern: str) -> Callable[[Site], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"layers={pattern!r} is neither ranges ('4-20') nor a regular expression: {error}") from None
    return lambda site: compiled.search(site.name) is not None
