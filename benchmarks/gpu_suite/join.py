"""Several result files as one, with its table: what a session measured in parts.

python -m benchmarks.gpu_suite.join PART.csv ... --out ALL.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu_suite.results import Results, read
from benchmarks.gpu_suite.table import markdown


def join(parts: list[Path], out: Path) -> Path:
    """Write the rows of the parts that exist to `out`, and the table beside it; returns the table's path.

    Raises:
        ValueError: no part exists, or one has other columns.
    """
    found = [path for path in parts if path.is_file()]
    if not found:
        raise ValueError(f"none of {', '.join(map(str, parts))} exists")
    results = Results(out)
    for path in found:
        for row in read(path):
            results.add(row)
    table = out.with_suffix(".md")
    gpus = " / ".join(dict.fromkeys(str(row["gpu"]) for row in results.rows))
    table.write_text(markdown(results.rows, f"Block-sparse attention on {gpus}"), encoding="utf-8")
    return table


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(given)
    print(join(options.parts, options.out))


if __name__ == "__main__":
    main()
