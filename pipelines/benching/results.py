"""The CSV file of a run: written row by row, so that a run that is killed keeps what it has."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = dict[str, object]


class Results:
    """Rows by what they measure.

    Args:
        columns: of the file, in order.
        key: the columns by which rows are told apart; a row measured again replaces its predecessor.
        keep: begin with the rows that the file holds.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str], keep: bool = False) -> None:
        self.path, self.columns, self._names = path, tuple(columns), tuple(key)
        self._rows: dict[tuple[str, ...], Row] = {}
        if keep and path.is_file():
            self._rows = {self._key(row): row for row in read(path, columns)}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def find(self, row: Mapping[str, object]) -> Row | None:
        """The row that measures the same, if there is one."""
        return self._rows.get(self._key(row))

    def add(self, *rows: Mapping[str, object]) -> None:
        """Take rows in and write the file anew; a half-written file never stands under the name."""
        for row in rows:
            self._rows[self._key(row)] = rounded(row, self.columns)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows.values())
        part.replace(self.path)

    def _key(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self._names)


def read(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a result file, as text.

    Raises:
        ValueError: a file with other columns than today's.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{path} has other columns than this version writes: move it away, or measure all anew")
        return [dict(row) for row in reader]


def rounded(row: Mapping[str, object], columns: Sequence[str]) -> Row:
    """In the order of the columns, numbers to five digits, -1 for what is missing: never a blank.

    Raises:
        ValueError: a name that is no column.
    """
    unknown = set(row) - set(columns)
    if unknown:
        raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
    return {name: _short(row.get(name, -1)) for name in columns}


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value if value != "" else "-"
