"""configs/<method>/<model>.yaml -> the settings of a method for a model, at three qualities.

A file says:

    title: as people call the model
    method: gna
    families: [wan]                        # names of the families it is for
    match: {num_layers: 30}                # optional: values (or lists of values) that model.config must have
    prefer: {num_layers: 40}               # optional: of several files that match, one whose `prefer` matches too wins
    base_size: [21, 30, 52]                # optional: the token grid that the settings are for
    min_tokens: 1024                       # optional: shorter sequences stay dense (UNets have several)
    tiling: {q: [4, 8, 8], kv: [2, 8, 8]}  # optional: a tiling at which the settings need no mask
    recommend: true                        # optional: `patch` without a method may choose this
    evidence: published                    # or derived: chosen by the simulator, quality not measured
    source: where it stands
    notes: what a user should know
    qualities:
      safe | balanced | fast:              # all three
        dense_steps: 15/50                 # share of the schedule that stays dense: 0..1, or a fraction; of its start,
                                           # or a list of two: of its start and of its end
        layers: [0, 1]                     # optional: indices of the layers to patch
        evidence, source, tiling: ...      # optional: where they differ from the file's
        window: ...                        # everything else is an option of the method
    measured:                              # optional, by `tools/preset_evidence.py`: a row a model and size
      safe | balanced | fast:
      - {model: ..., tokens: 4096, density: 0.25, speedup: 1.4, loss: 0.2, half: 0.1, cases: 9, machine: ..., ...}
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import yaml

QUALITIES = ("safe", "balanced", "fast")
EVIDENCE = ("published", "derived")
_REQUIRED = {"title": str, "method": str, "families": list, "evidence": str, "source": str, "qualities": dict}
_OPTIONAL = {
    "match": dict, "prefer": dict, "base_size": list, "min_tokens": int, "tiling": dict, "recommend": bool,
    "notes": str, "measured": dict,
}  # fmt: skip
_OF_QUALITY = ("dense_steps", "layers", "evidence", "source", "tiling")
# of a measured row: tokens of the grid, share of the pairs, times faster (whole runs), and against dense with the same
# seed the relative L2 of the last latents, or the KL of a language model, with half of its 95 % interval over the cases
MEASURED = {
    "model": str, "tokens": int, "density": float, "speedup": float, "loss": float, "half": float, "cases": int,
    "machine": str, "torch": str, "commit": str, "date": str,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """One quality of one file. `options` are keyword options of the method, `dense_steps` one share of the schedule or
    two, `of_one_model`: the file names values that the model's config must have."""

    name: str
    title: str
    method: str
    quality: str
    options: Mapping[str, Any]
    dense_steps: float | tuple[float, float]
    evidence: str
    source: str
    layers: tuple[int, ...] | None = None
    min_tokens: int = 0
    tiling: Mapping[str, Any] | None = None
    notes: str = ""
    measured: tuple[Mapping[str, Any], ...] = ()
    of_one_model: bool = False

    @property
    def measured_tokens(self) -> tuple[int, int] | None:
        """Tokens of the least and the largest grid that it was measured at. None where it was measured on one model
        and is for many: other sizes are then what it is for."""
        sizes = [row["tokens"] for row in self.measured]
        return (min(sizes), max(sizes)) if sizes and self.of_one_model else None


@dataclass(frozen=True)
class PresetFile:
    """A validated file; `at(quality)` gives the preset."""

    name: str
    title: str
    method: str
    families: tuple[str, ...]
    match: Mapping[str, Any]
    prefer: Mapping[str, Any]
    recommend: bool
    base_size: tuple[int, ...] | None
    presets: Mapping[str, Preset]

    def at(self, quality: str) -> Preset:
        return self.presets[quality]

    def fits(self, model: object) -> bool:
        """Whether `model.config` has the values that `match` asks for (no `match`: every model of the families)."""
        return _agrees(self.match, model)


def resolve(
    method: str, family: str, model: object, quality: str = "balanced", preset: str | None = None
) -> Preset | None:
    """The preset for a model of `family`; None where there is none (only without an explicit `preset`).

    Raises:
        ValueError: an unknown quality; a `preset` that does not exist, or is for another method, family or model.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality={quality!r}: legal are {', '.join(QUALITIES)}")
    if preset is not None:
        return _explicit(method, family, model, preset).at(quality)
    fitting = [row for row in load() if row.method == method and family in row.families and row.fits(model)]
    # A preferred file before others, then the one that says most about the model; the sort is stable.
    fitting.sort(key=lambda row: (not (row.prefer and _agrees(row.prefer, model)), -len(row.match)))
    return fitting[0].at(quality) if fitting else None


def recommend(family: str, model: object) -> str | None:
    """The method that `patch` takes when none is named, or None."""
    for row in load():
        if row.recommend and family in row.families and row.fits(model):
            return row.method
    return None


def available(method: str | None = None, family: str | None = None) -> tuple[PresetFile, ...]:
    """All presets, or those of a method or family, by name."""
    return tuple(
        row for row in load() if (method is None or row.method == method) and (family is None or family in row.families)
    )


@functools.cache
def load() -> tuple[PresetFile, ...]:
    """Every file under attn_plugins.configs but the recipes of `attn-plugins upcycle`, sorted by method and name."""
    rows = []
    for folder in importlib.resources.files("attn_plugins.configs").iterdir():
        if folder.is_dir() and folder.name != "bam":
            for file in folder.iterdir():
                if file.name.endswith(".yaml"):
                    rows.append(parse(file.read_text(encoding="utf-8"), folder.name, file.name))
    return tuple(sorted(rows, key=lambda row: (row.method, row.name)))


def parse(text: str, folder: str, filename: str) -> PresetFile:
    """A file's text, checked.

    Raises:
        ValueError: a missing, unknown or ill-typed key; the message names the file, the key and what is legal.
    """
    where = f"configs/{folder}/{filename}"
    data = yaml.safe_load(text)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: holds {type(data).__name__}; a preset is a mapping with {', '.join(_REQUIRED)}")
    for key in _REQUIRED.keys() - data.keys():
        raise ValueError(f"{where}: {key} is missing; required are {', '.join(_REQUIRED)}")
    for key, value in data.items():
        kind = (_REQUIRED | _OPTIONAL).get(key)
        if kind is None:
            raise ValueError(f"{where}: unknown key {key!r}; legal are {', '.join(_REQUIRED | _OPTIONAL)}")
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {key}={value!r}: must be a {kind.__name__}")
    if data["method"] != folder:
        raise ValueError(f"{where}: method={data['method']!r}: must be {folder!r}, the folder it stands in")
    if tuple(data["qualities"]) != QUALITIES:
        raise ValueError(f"{where}: qualities={list(data['qualities'])}: must be {', '.join(QUALITIES)}, in this order")
    name = filename.removesuffix(".yaml")
    base_size = tuple(data["base_size"]) if "base_size" in data else None
    presets = {quality: _quality(where, name, data, quality) for quality in QUALITIES}
    return PresetFile(
        name, data["title"], folder, tuple(data["families"]), data.get("match", {}), data.get("prefer", {}),
        data.get("recommend", False), base_size, presets,
    )  # fmt: skip


def _quality(where: str, name: str, data: dict[str, Any], quality: str) -> Preset:
    where = f"{where}: qualities.{quality}"
    row = data["qualities"][quality]
    if not isinstance(row, dict) or "dense_steps" not in row:
        raise ValueError(f"{where}: must be a mapping with dense_steps and the method's options")
    dense_steps = _shares(where, row["dense_steps"])
    evidence = row.get("evidence", data["evidence"])
    if evidence not in EVIDENCE:
        raise ValueError(f"{where}.evidence={evidence!r}: legal are {', '.join(EVIDENCE)}")
    options = {key: value for key, value in row.items() if key not in _OF_QUALITY}
    if "base_size" in data:
        options["base_size"] = data["base_size"]
    layers = row.get("layers")
    if layers is not None and not (isinstance(layers, list) and all(isinstance(index, int) for index in layers)):
        raise ValueError(f"{where}.layers={layers!r}: must be a list of layer indices")
    return Preset(
        name, data["title"], data["method"], quality, options, dense_steps, evidence, row.get("source", data["source"]),
        None if layers is None else tuple(layers), data.get("min_tokens", 0),
        row.get("tiling", data.get("tiling")), data.get("notes", ""), _measured(where, data, quality),
        "match" in data,
    )  # fmt: skip


def _measured(where: str, data: dict[str, Any], quality: str) -> tuple[Mapping[str, Any], ...]:
    """The measured rows of a quality, all of them whole."""
    wrong = sorted(set(data.get("measured", {})) - set(QUALITIES))
    if wrong:
        raise ValueError(f"{where}: measured: {', '.join(map(repr, wrong))}: legal are {', '.join(QUALITIES)}")
    rows = data.get("measured", {}).get(quality, [])
    kinds = {name: (float, int) if kind is float else kind for name, kind in MEASURED.items()}
    for row in rows:
        whole = isinstance(row, dict) and row.keys() == MEASURED.keys()
        if not whole or not all(isinstance(row[name], kind) and row[name] == row[name] for name, kind in kinds.items()):
            raise ValueError(f"{where}: measured: {row!r}: a row has {', '.join(MEASURED)}, and nothing else")
    return tuple(rows)


def _shares(where: str, value: Any) -> float | tuple[float, float]:
    """`dense_steps` as a file has it."""
    given = value if isinstance(value, list) else [value]
    try:
        shares = [float(Fraction(str(share))) for share in given]
    except (ValueError, ZeroDivisionError):
        shares = []
    if len(shares) not in (1, 2) or not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"{where}.dense_steps={value!r}: give a share of the schedule, as 0.3 or 15/50, or two, of start and end"
        )
    return shares[0] if len(shares) == 1 else (shares[0], shares[1])


def _explicit(method: str, family: str, model: object, preset: str) -> PresetFile:
    named = [row for row in load() if row.name == preset]
    if not named:
        names = sorted({row.name for row in available(method) or load()})
        near = get_close_matches(preset, names, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(names)}"
        raise ValueError(f"preset={preset!r}: no such preset; {hint}")
    of_method = [row for row in named if row.method == method]
    if not of_method:
        raise ValueError(f"preset={preset!r} is for method {named[0].method!r}, not {method!r}")
    row = of_method[0]
    if family not in row.families:
        raise ValueError(
            f"preset={preset!r} is for models of {', '.join(row.families)}; "
            f"this {type(model).__name__} is of {family!r}"
        )
    if not row.fits(model):
        has = {key: _value(model, key) for key in row.match}
        raise ValueError(
            f"preset={preset!r} is for {row.title}, whose config has {dict(row.match)}; "
            f"this {type(model).__name__} has {has}. Leave preset out, or give the options yourself"
        )
    return row


def _agrees(wanted: Mapping[str, Any], model: object) -> bool:
    return all(_value(model, key) in (legal if isinstance(legal, list) else [legal]) for key, legal in wanted.items())


def _value(model: object, key: str) -> Any:
    """A value of `model.config` (an object or a mapping), tuples as lists; None where there is none."""
    config = getattr(model, "config", None)
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return list(value) if isinstance(value, tuple) else value
