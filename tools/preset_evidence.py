"""Put what tunings found where it is read: rows of `measured` in the presets' files, tables in docs/tuning.md.

    python tools/preset_evidence.py [FOLDER ...]     # default: all of benchmarks/results/tuned, of `figures.py tuned`

A folder is what `attn-plugins tune --all-presets --out FOLDER` writes. Rows of the same model and size are replaced.
The page has the tables of benchmarks/results/tuned, whatever else is read.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attn_plugins import presets, recipe  # noqa: E402
from attn_plugins.pipelines.markdown import fill, table  # noqa: E402

TUNED = ROOT / "benchmarks" / "results" / "tuned"
PAGE = ROOT / "docs" / "tuning.md"


@dataclass(frozen=True)
class Tuning:
    """What a folder holds. `rows`: of front.csv, the last cases alone. `evidence`: of its recipe."""

    name: str
    rows: list[dict[str, str]]
    evidence: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Tuning:
        with (folder / "front.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["set"] == "test"]
        if not rows:
            raise ValueError(f"{folder}: nothing was tested there; give more prompts, or rows of text")
        return cls(folder.name, rows, dict(recipe.read(folder / "recipe.yaml").evidence))

    def measured(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """{(method, preset, quality): a row of presets.MEASURED}; what has no density is left out."""
        about = {name: self.evidence[name] for name in ("machine", "torch", "commit", "date")}
        found = {}
        for row in self.rows:
            method, _, rest = row["setting"].partition(" ")
            preset, _, quality = rest.partition(" ")
            if quality in presets.QUALITIES and row["density"]:
                found[method, preset, quality] = {
                    "model": self.evidence["model"], "tokens": self.evidence["tokens"][0],
                    "density": _short(row["density"]), "speedup": round(float(row["speedup"]), 2),
                    "loss": _short(row["loss"]), "half": _short(row["half"]), "cases": int(row["cases"]), **about,
                }  # fmt: skip
        return found

    def pictures(self) -> list[str]:
        """As the page names them."""
        name = f"pictures/tuned_{self.name}.png"
        return [name] if (PAGE.parent / name).is_file() else []

    def section(self) -> str:
        """A heading and a table in Markdown, quickest first."""
        told = self.evidence
        rows = []
        for row in sorted(self.rows, key=lambda row: -float(row["speedup"])):
            name = f"**{row['setting']}** (chosen)" if row["chosen"] == "True" else row["setting"]
            foreseen = ""
            if row["foreseen loss"]:
                foreseen = f"{float(row['foreseen speedup']):.2f}, {float(row['foreseen loss']):.2g}"
            loss = f"{float(row['loss']):.2g} ± {float(row['half']):.1g}"
            density = f"{float(row['density']):.0%}" if row["density"] else "?"
            rows.append((name, f"{float(row['speedup']):.2f}", loss, density, foreseen))
        return "\n\n".join(
            (
                f"### {told['model']}, {told['tokens'][0]:,} tokens",
                f"`benchmarks/results/tuned/{self.name}/front.csv`: {self.rows[0]['cases']} runs of each that nothing "
                f"was chosen by; {told['machine']}, torch {told['torch']}, {told['date']}. Loss: "
                f"{told['loss']['name']}.",
                *[f"![Speed against loss]({picture})" for picture in self.pictures()],
                table(("setting", "times faster", "loss", "density", "foreseen"), rows),
            )
        )


def write(found: dict[tuple[str, str, str], dict[str, Any]]) -> list[Path]:
    """Put rows into the presets' files; what other models and sizes have there stays."""
    written = []
    for row in presets.load():
        file = ROOT / "configs" / row.method / f"{row.name}.yaml"
        new = {quality: found.get((row.method, row.name, quality)) for quality in presets.QUALITIES}
        if not any(new.values()):
            continue
        text = file.read_text(encoding="utf-8")
        known = yaml.safe_load(text).get("measured", {})
        told = {quality: _merged(known.get(quality, []), new[quality]) for quality in presets.QUALITIES}
        text = re.sub(r"^measured:.*\Z", "", text, flags=re.MULTILINE | re.DOTALL).rstrip()
        rows = yaml.safe_dump({"measured": told}, sort_keys=False, default_flow_style=None, width=120)
        text = f"{text}\n{rows}"
        presets.parse(text, row.method, file.name)
        file.write_text(text, encoding="utf-8")
        written.append(file)
    return written


def _merged(known: Iterable[dict[str, Any]], new: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows by model and size, `new` in the place of its like."""
    rows = {(row["model"], row["tokens"]): row for row in [*known, *([new] if new else [])]}
    return [rows[key] for key in sorted(rows)]


def _short(number: str) -> float:
    return float(f"{float(number):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    ours = sorted(path.parent for path in TUNED.glob("*/front.csv"))
    for folder in parser.parse_args().folders or ours:
        for path in write(Tuning.read(folder).measured()):
            print(path)
    print(fill(PAGE, "tuned", "\n\n".join(Tuning.read(folder).section() for folder in ours)))


if __name__ == "__main__":
    main()
