"""The CSV file of a run, with the columns of the GPU benchmark."""

from __future__ import annotations

from pathlib import Path

from attn_plugins.pipelines.benching import results
from benchmarks.gpu_suite.columns import COLUMNS, KEY, Row


class Results(results.Results):
    """Rows by what they measure. `keep`: begin with the rows that the file holds; a row measured again replaces its
    predecessor.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        super().__init__(path, COLUMNS, KEY, keep)


def read(path: Path) -> list[Row]:
    """The rows of a result file, as text.

    Raises:
        ValueError: a file with other columns than today's.
    """
    return results.read(path, COLUMNS)
