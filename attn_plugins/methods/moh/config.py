"""The options of MoH, and how many heads they make of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from attn_plugins.method import MethodConfig

ROUTERS = ("auto", "learned", "ridge", "query_norm")
SCALES = ("code", "paper")
GRANULARITIES = ("head", "group")


class Budget(NamedTuple):
    """What is routed in a layer, in units: heads, or groups of heads that share a KV head.

    shared: those that every token gets; routed: K, how many of the others a token gets; group: heads of a unit.
    """

    units: int
    shared: int
    routed: int
    group: int

    @property
    def experts(self) -> int:
        """E, the units that a router chooses among."""
        return self.units - self.shared

    @property
    def active(self) -> int:
        """Units of a token."""
        return self.shared + self.routed


@dataclass(frozen=True)
class MoHConfig(MethodConfig):
    """How many heads a token gets, and who chooses them.

    Args:
        active: heads computed per token, the shared ones among them: a float is a share of the heads, an int a number.
            After `calibrate`, the mean over the layers.
        shared: heads that every token gets, likewise. None: of learned and ridge routers a quarter of the heads, at
            least one; of query norms two thirds of the active ones (the paper's 16 of 24 in a LLaMA3-8B).
        router: "learned", gates of two stages from the layer's input, to be trained; "ridge", gates 0 or 1 by how large
            each head's part of the output will be, calibrated without training; "query_norm", gates 0 or 1 by the norm
            of a head's query, without weights; "auto", what the paper has: query norms in language models, unless
            they norm their queries head by head, else learned.
        scale: of learned gates: "code", which average 1, or "paper", whose sum is at most 1.
        granularity: "head", or "group": heads that share a KV head are routed together (not the paper's).
        skip_projections: leave out the rows of the query projection and the columns of the output projection of heads
            that a token does not get, too, where nothing is trained.
        backend: of the operator.
    """

    binding: ClassVar[tuple[str, ...]] = ("active", "shared", "router", "scale", "granularity")

    active: float | int = 0.75
    shared: float | int | None = None
    router: str = "auto"
    scale: str = "code"
    granularity: str = "head"
    skip_projections: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, legal in (("router", ROUTERS), ("scale", SCALES), ("granularity", GRANULARITIES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: legal are {', '.join(map(repr, legal))}")
        if not _legal(self.active, least=1) or self.active == 0:
            raise ValueError(f"active={self.active!r}: give a share of the heads above 0 and up to 1.0, or a number")
        if self.shared is not None and (
            not _legal(self.shared, least=0) or (type(self.shared) is float and self.shared >= 1)
        ):
            raise ValueError(f"shared={self.shared!r}: give a share of the heads below `active`, a number, or None")
        if self.skip_projections and self.router == "query_norm":
            raise ValueError(
                "skip_projections=True with router='query_norm': the router reads the queries that would be left out; "
                "legal are 'learned' and 'ridge'"
            )
        if self.scale == "paper" and self.router in ("ridge", "query_norm"):
            raise ValueError(f"scale='paper' is of learned gates; those of router={self.router!r} are 0 or 1")

    def budget(self, heads: int, group: int = 1) -> Budget:
        """What `active` and `shared` are in a layer of so many heads, of which `group` share a KV head.

        Raises:
            ValueError: numbers that leave nothing to route, or do not fit; the message names them.
        """
        size = group if self.granularity == "group" else 1
        units = heads // size
        active = max(1, _units("active", self.active, units, size))
        if self.shared is not None:
            shared = _units("shared", self.shared, units, size)
        elif self.router == "query_norm":
            shared = min(max(1, round(active * 2 / 3)), active - 1)
        else:
            shared = min(max(1, units // 4), active - 1)
        if size > 1 and units == 1 and self.active != 1.0 and self.active != heads:
            raise ValueError(
                f"active={self.active} with granularity='group': the {heads} heads of a layer share one KV head, which "
                "leaves nothing to choose; legal is granularity='head'"
            )
        if not shared < active <= units:
            of = f"{units} groups of {size} heads" if size > 1 else f"{heads} heads"
            raise ValueError(
                f"active={self.active}, shared={self.shared} of {of} are {active} and {shared}: legal are "
                f"1..{units} active, and fewer shared than active, for a router needs one to choose"
            )
        return Budget(units, shared, active - shared, size)


def _legal(value: object, least: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= least if isinstance(value, int) else 0 <= value <= 1


def _units(name: str, value: float | int, units: int, size: int) -> int:
    if isinstance(value, float):
        return round(value * units)
    if value % size:
        raise ValueError(f"{name}={value} heads with granularity='group': give a multiple of {size}, a group's heads")
    return value // size
