"""What a table says in the end: which rows are short of the mark or the aim, below a peer, below dense, or wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu_suite.columns import Row


@dataclass
class Line:
    """All sides of one case, precision, head size and direction."""

    sides: dict[str, Row] = field(default_factory=dict)

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.sides.values() if row["role"] == "ours"), None)

    @property
    def any(self) -> Row:
        return next(iter(self.sides.values()))

    @property
    def name(self) -> str:
        row = self.any
        return f"{row['case']} {row['dtype']} D{row['head_dim']} {row['direction']}"

    def number(self, side: str, column: str) -> float:
        """-1 where that side is not there."""
        row = self.sides.get(side)
        return -1.0 if row is None else float(str(row[column]))


def lines(rows: Iterable[Row]) -> list[Line]:
    """Rows grouped by what was measured, in order of appearance."""
    found: dict[tuple[str, ...], Line] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("case", "dtype", "head_dim", "direction"))
        found.setdefault(key, Line()).sides[str(row["side"])] = row
    return list(found.values())


def summary(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Headings to lines of text, empty lists included. Dense and peers are compared by their medians."""
    kinds: list[list[str]] = [[] for _ in range(6)]
    wrong, short, below_aim, reached, below_dense, below_peer = kinds
    for line in lines(rows):
        wrong += [f"{line.name} {side}: {row['note']}" for side, row in line.sides.items() if _is_wrong(row)]
        if line.ours is None:
            continue
        side = str(line.ours["side"])
        ms, share, passes, aim = (line.number(side, column) for column in ("ms", "share", "pass", "aim"))
        if ms <= 0:
            short.append(f"{line.name}: not measured ({line.ours['note']})")
            continue
        dense = line.number(side, "baseline_ms")
        if 0 < dense < ms:
            below_dense.append(f"{line.name}: {ms:.3g} ms, dense {dense:.3g} ms ({line.ours['baseline']})")
        for peer, row in line.sides.items():
            theirs = line.number(peer, "ms")
            if row["role"] == "peer" and 0 < theirs < ms:
                below_peer.append(f"{line.name}: {ms:.3g} ms, {peer} {theirs:.3g} ms")
        if passes > 0:
            target = short if share < passes else below_aim if share < aim else reached
            target.append(f"{line.name}: {share:.1%} of ideal (mark {passes:.0%}, aim {aim:.0%})")
    return {
        "Wrong results (not timed)": wrong,
        "Below the pass mark": short,
        "Passed, below the aim": below_aim,
        "At the aim": reached,
        "Slower than dense": below_dense,
        "Slower than a peer": below_peer,
    }


def ours_ran(rows: Sequence[Row]) -> bool:
    """Whether ours was right, and ran, in every row: the exit status of a run."""
    return all(float(str(row["ms"])) > 0 for row in rows if row["role"] == "ours")


def _is_wrong(row: Row) -> bool:
    return str(row["note"]).startswith("WRONG")
