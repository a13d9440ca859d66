"""What `attn-plugins upcycle` is told: a YAML file, or `UpcycleSettings`.

base_model: path or name               # the seed; also an expert, unless include_base: false
method: bam                            # bam | btx | sparse_upcycle
attention: {experts: all_params, router: soft}      # all_params | shared_kv; for bam alone
ffn: {top_k: 1, gate: unit}            # gate: unit | paper
merge: mean                            # of all that is not routed
router_init: random                    # random | hidden: the base's hidden states on prompts of each expert
seed: 0                                # of random routers
experts:
  - source_model: path or name
    name: code                         # optional, for reports
    positive_prompts: ["def f(x):"]    # for router_init: hidden
base_prompts: [...]                    # the same for the base
num_experts: 4                         # for sparse_upcycle, instead of experts
losses: {balance: 0.01, z: 0.001}      # weights of the routers' losses in training
allow_identical: false                 # experts that are equal are an error otherwise
dtype: bfloat16                        # default: the base's
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("bam", "btx", "sparse_upcycle")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Expert:
    """A dense model that becomes an expert. prompts: texts that it should be given, for `router_init="hidden"`."""

    source: str
    name: str
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpcycleSettings:
    """See above. `experts`: those besides the base; `attention`: "all_params", "shared_kv" or "mean".

    Raises:
        ValueError: a value that is not legal, or settings that do not go together.
    """

    base_model: str
    experts: tuple[Expert, ...] = ()
    method: str = "bam"
    include_base: bool = True
    base_prompts: tuple[str, ...] = ()
    num_experts: int | None = None
    attention: str = "all_params"
    top_k: int = 1
    gate: str = "unit"
    router_init: str = "random"
    seed: int = 0
    balance: float = 0.01
    z: float = 0.001
    allow_identical: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        _legal("method", self.method, METHODS)
        _legal("ffn.gate", self.gate, ("unit", "paper"))
        _legal("router_init", self.router_init, ("random", "hidden"))
        _legal("attention.experts", self.attention, ("all_params", "shared_kv") if self.method == "bam" else ("mean",))
        if self.dtype is not None:
            _legal("dtype", self.dtype, DTYPES)
        _numbers(self)
        if self.method == "sparse_upcycle":
            if self.experts or not self.num_experts or self.router_init != "random":
                raise ValueError(
                    "sparse_upcycle makes experts of copies of base_model: give num_experts, and neither experts nor "
                    "router_init: hidden"
                )
        elif self.num_experts is not None or not self.experts:
            raise ValueError(f"{self.method} takes a list of experts, each with source_model, and no num_experts")
        count = len(self.members)
        if not 1 <= self.top_k <= count:
            raise ValueError(f"ffn.top_k={self.top_k}: legal are 1 to {count}, the number of experts")
        silent = [member.name for member in self.members if not member.prompts]
        if self.router_init == "hidden" and silent:
            raise ValueError(
                "router_init: hidden needs positive_prompts of every expert (base_prompts of the base); "
                f"{silent[0]} has none"
            )

    @property
    def members(self) -> tuple[Expert, ...]:
        """All experts, the base first if it is one."""
        base = Expert(self.base_model, "base", self.base_prompts)
        if self.method == "sparse_upcycle":
            return tuple(Expert(self.base_model, f"copy {n}") for n in range(self.num_experts or 0))
        return (base, *self.experts) if self.include_base else self.experts

    @classmethod
    def of_file(cls, path: str | Path) -> UpcycleSettings:
        """Read a YAML file. Paths in it are relative to it.

        Raises:
            ValueError: no such file, not YAML, an unknown key.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; give a YAML file (docs/bam.md shows one)")
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        try:
            return cls.of(told, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, told: Any, folder: Path = Path()) -> UpcycleSettings:
        """From what the YAML says."""
        _keys("the file", told, _TOP)
        if "base_model" not in told:
            raise ValueError("base_model is missing")
        _lists(told, "experts", "base_prompts")
        _legal("merge", told.get("merge", "mean"), ("mean",))
        method = told.get("method", "bam")
        attention, ffn, losses = (_part(told, part) for part in ("attention", "ffn", "losses"))
        _keys("attention", attention, ("experts", "router"))
        _keys("ffn", ffn, ("top_k", "gate"))
        _keys("losses", losses, ("balance", "z"))
        _legal("attention.router", attention.get("router", "soft"), ("soft",))
        if method != "bam" and attention:
            raise ValueError(f"attention is for method: bam; {method} has one attention, the mean of its experts'")
        plain = {key: told[key] for key in _PLAIN if key in told}
        return cls(
            _place("base_model", told["base_model"], folder),
            tuple(_expert(row, number, folder) for number, row in enumerate(told.get("experts") or ())),
            method,
            base_prompts=tuple(told.get("base_prompts") or ()),
            attention=attention.get("experts", "all_params") if method == "bam" else "mean",
            **plain,
            **ffn,
            **losses,
        )


_PLAIN = ("include_base", "num_experts", "router_init", "seed", "allow_identical", "dtype")
_TOP = ("base_model", "method", "attention", "ffn", "merge", "experts", "base_prompts", "losses", *_PLAIN)


def _expert(row: Any, number: int, folder: Path) -> Expert:
    _keys(f"experts[{number}]", row, ("source_model", "name", "positive_prompts"))
    if "source_model" not in row:
        raise ValueError(f"experts[{number}] has no source_model")
    source = _place(f"experts[{number}].source_model", row["source_model"], folder)
    _lists(row, "positive_prompts")
    return Expert(source, row.get("name") or Path(source).name, tuple(row.get("positive_prompts") or ()))


def _place(what: str, source: Any, folder: Path) -> str:
    """A folder beside the file, else as it is said: a path (`~` is one's home), or a name on the Hub."""
    if not isinstance(source, str) or not source:
        raise ValueError(f"{what}={source!r}: give a folder, or a name on the Hub")
    if source.startswith("~"):
        try:
            return str(Path(source).expanduser())
        except RuntimeError as error:
            raise ValueError(f"{what}={source!r}: {error}") from error
    beside = folder / source
    return str(beside) if beside.is_dir() else source


def _part(told: Mapping[str, Any], name: str) -> Any:
    return {} if told.get(name) is None else told[name]


def _lists(told: Mapping[str, Any], *names: str) -> None:
    """A text alone would be taken for a list of its letters."""
    for name in names:
        value = told.get(name)
        texts = name.endswith("prompts")
        if value is not None and (
            not isinstance(value, list) or texts and not all(isinstance(text, str) for text in value)
        ):
            raise ValueError(f"{name}={value!r}: give a list{' of texts' if texts else ''}")


def _numbers(settings: UpcycleSettings) -> None:
    for name in ("include_base", "allow_identical"):
        if not isinstance(getattr(settings, name), bool):
            raise ValueError(f"{name}={getattr(settings, name)!r}: legal are true, false")
    whole = (("ffn.top_k", settings.top_k), ("seed", settings.seed), ("num_experts", settings.num_experts))
    for name, number in whole:
        if number is not None and (type(number) is not int or not 0 <= number < 1 << 32):
            raise ValueError(f"{name}={number!r}: give a whole number from 0 to {(1 << 32) - 1}")
    for name, weight in (("losses.balance", settings.balance), ("losses.z", settings.z)):
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise ValueError(f"{name}={weight!r}: give a number of 0 or more (to YAML, 1e-2 is a text: write 1.0e-2)")


def _keys(what: str, told: Any, legal: tuple[str, ...]) -> None:
    if not isinstance(told, Mapping):
        raise ValueError(f"{what} is {told!r}: it has to have the keys {', '.join(legal)}")
    unknown = [key for key in told if key not in legal]
    if unknown:
        raise ValueError(f"{what} has an unknown key {unknown[0]!r}; legal are {', '.join(legal)}")


def _legal(name: str, value: Any, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name}={value!r}: legal are {', '.join(legal)}")
