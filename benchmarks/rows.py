"""Measured rows as a CSV file, written as they come, and on the screen."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from attn_plugins.pipelines.benching import machine

Case = TypeVar("Case")


Row = dict[str, object]


def write_rows(cases: Sequence[Case], measure: Callable[[Case], Row | list[Row]], out: Path) -> None:
    """Measure each case, and write and print its row or rows; every row ends with what it was measured on."""
    about = machine.describe()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = None
        for number, case in enumerate(cases, 1):
            found = measure(case)
            for row in found if isinstance(found, list) else [found]:
                if writer is None:
                    writer = csv.DictWriter(file, [*row, *about], lineterminator="\n")
                    writer.writeheader()
                writer.writerow({**row, **about})
                file.flush()
                print(f"[{number}/{len(cases)}]", *(f"{name} {value}" for name, value in row.items()), flush=True)
