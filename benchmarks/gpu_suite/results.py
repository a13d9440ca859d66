"""The CSV file of a run: written row by row, so that a run that is killed keeps what it has."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.gpu_suite.columns import COLUMNS, KEY, Row, rounded


class Results:
    """Rows by what they measure. `keep`: begin with the rows that the file holds; a row measured again replaces its
    predecessor.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        self.path = path
        self._rows: dict[tuple[str, ...], Row] = {}
        if keep and path.is_file():
            self._rows = {_key(row): row for row in read(path)}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def add(self, row: Row) -> None:
        """Take a row in and write the file anew; a half-written file never stands under the name."""
        self._rows[_key(row)] = rounded(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows.values())
        part.replace(self.path)


def read(path: Path) -> list[Row]:
    """The rows of a result file, as text.

    Raises:
        ValueError: a file with other columns than today's.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: move it away, or measure all anew")
        return [dict(row) for row in reader]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)
