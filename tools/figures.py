"""Make the figures and pictures of README and docs anew: `python tools/figures.py NAME ...`; without names, a list.

A name runs the commands that a user would run, copies the pictures that they leave into docs/pictures, and puts their
tables between the markers of the page. A machine that does other work gives wrong times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attn_plugins.pipelines.benching.machine import describe  # noqa: E402
from attn_plugins.pipelines.comparing.overview import COLUMNS, cell, columns_of  # noqa: E402
from attn_plugins.pipelines.markdown import fill, table  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
RESULTS = "benchmarks/results"
MINUTES, HOURS = "minutes", "an hour or more"
WIDTH = 120  # of a page's lines


@dataclass(frozen=True)
class Figure:
    """`page`: where it stands. `takes`: on two cores, roughly. `commands`: run in the root of the repository, `{out}`
    their folder. `pictures`: {file that they leave: name in docs/pictures}. `finish`: fills the page."""

    page: str
    takes: str
    commands: tuple[str, ...]
    pictures: dict[str, str] = field(default_factory=dict)
    finish: Callable[[Path], object] | None = None

    def make(self, name: str) -> None:
        out = ROOT / "out" / "figures" / name
        for command in self.commands:
            command = command.format(out=out.relative_to(ROOT))
            print(f"$ {command}", flush=True)
            words = command.split()
            words[0] = str(Path(sys.executable).with_name(words[0]))
            subprocess.run(words, cwd=ROOT, check=True)
        for file, picture in self.pictures.items():
            print(shutil.copyfile(ROOT / file.format(out=out), PICTURES / picture))
        if self.finish is not None:
            self.finish(out)


def demo(out: Path) -> None:
    """README's table: the demo's one method beside dense."""
    told = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    text = (
        f"What `make demo` printed on {machine(told)}: the embedded model, 20 steps, 16 frames (4,096 tokens), preset "
        "`balanced` (a window of 4 frames of 16, the first 30 % of the steps dense), seed 0."
    )
    after = '"At most" is Amdahl\'s bound. The operator alone, against dense attention and per tile size, is in\n'
    after += "[docs/benchmarks.md](docs/benchmarks.md)."
    print(fill(ROOT / "README.md", "demo", "\n\n".join((textwrap.fill(text, WIDTH), beside(told), after))))


def compare(out: Path) -> None:
    """docs/compare.md's example."""
    told = json.loads((out / "small_llama.json").read_text(encoding="utf-8"))
    text = f"on {machine(told)}, 8 rows of 2,048 tokens of documents that the model was not trained on:"
    lines = [f"```bash\n{COMPARE}\n```", textwrap.fill(text, WIDTH), beside(told)]
    print(fill(ROOT / "docs" / "compare.md", "compare", "\n\n".join(lines)))


def machine(told: dict[str, Any]) -> str:
    """Of a comparison's JSON, with the processor's name, and the day."""
    return f"{describe()['cpu']}, {told['machine'].partition(', ')[2]}, {datetime.date.today().isoformat()}"


def beside(told: dict[str, Any]) -> str:
    """The table of a comparison's JSON: a line for each figure, a column for dense and each method."""
    dense = dict(told["dense"])
    if dense.get("drift") == 0:  # infinite is null in JSON
        dense |= {column.name: math.inf for column in COLUMNS if column.title == "PSNR" and column.name in dense}
    rows = {"dense": dense, **{f"`{row['method']}`": row["figures"] for row in told["methods"]}}
    lines = []
    for column in columns_of(list(rows.values())):
        of, _, what = column.name.rpartition("_")
        title = f"{of}: {column.title}" if what in ("speedup", "bound", "share") else column.title
        lines.append([title, *(cell(column, figures) for figures in rows.values())])
    return table(["", *rows], lines)


def evidence(out: Path) -> None:
    """Rows of the presets, and docs/tuning.md."""
    subprocess.run([sys.executable, "tools/preset_evidence.py"], cwd=ROOT, check=True)


def example(script: str, left: str, picture: str) -> Figure:
    """A training of docs/continue_tuning.md. left: the picture that it leaves."""
    command = f"python examples/{script} --out {{out}}"
    return Figure("docs/continue_tuning.md", HOURS, (command,), {f"{{out}}/{left}": picture})


COMPARE = (
    "attn-plugins compare small_llama moa:span=0.5 moa:pattern=streaming,window=508 moba:block=128,k_blocks=4 "
    "--rows 8 --threads 1"
)
BENCH = f"attn-plugins bench --threads 2 --resume --rounds 3 --seconds 0.3 --out {RESULTS}/bench_cpu.csv"
SLOW = "--backends sdpa_flash,sdpa_documents,flex,ours_plan,ours_operator"
TUNE, TUNED = "attn-plugins tune moving_digits --steps 10 --all-presets", f"{RESULTS}/tuned"
PARTS = ("heads", "groups", "distance", "steps")

FIGURES = {
    "demo": Figure("README.md", MINUTES, ("attn-plugins demo --out {out}",), {"{out}/demo_gna.png": "demo.png"}, demo),
    "gallery": Figure("docs/gallery.md", MINUTES, ("python tools/gallery.py",)),
    "regions": Figure("docs/regions.md", MINUTES, ("python tools/regions_picture.py",)),
    "compare": Figure("docs/compare.md", MINUTES, (f"{COMPARE} --out {{out}}",), finish=compare),
    "profile_digits": Figure(
        "docs/profile.md", MINUTES, ("attn-plugins profile moving_digits --steps 4 --keep 0.8 --check --out {out}",),
        {f"{{out}}/{part}.png": f"profile_digits_{part}.png" for part in PARTS},
    ),
    "profile_llama": Figure(
        "docs/profile.md", MINUTES, ("attn-plugins profile small_llama --check --out {out}",),
        {f"{{out}}/{part}.png": f"profile_llama_{part}.png" for part in PARTS[:3]},
    ),
    "tuned": Figure(
        "docs/tuning.md, presets", HOURS,
        (
            f"{TUNE} --faster 1.3 --head-groups 2 --out {TUNED}/moving_digits",
            f"{TUNE} --faster 1.1 -a frames=4 --out {TUNED}/moving_digits_short",
            f"attn-plugins tune small_llama --faster 1.2 --rows 16 --all-presets --out {TUNED}/small_llama",
        ),
        {f"{TUNED}/{name}/front.png": f"tuned_{name}.png" for name in ("moving_digits", "small_llama")},
        finish=evidence,
    ),
    "bench": Figure(
        "docs/bench.md", HOURS,
        (
            f"{BENCH} --lengths 2k,4k --dtype fp32,bf16", f"{BENCH} --lengths 8k {SLOW}",
            f"{BENCH} --lengths 2k --backward", f"{BENCH} --plot --page docs/bench.md",
        ),
    ),
    "moa_search": Figure(
        "docs/moa_search.md", HOURS,
        (
            *(f"attn-plugins moa-search --density 0.25 --seed {one} --threads 1 --out {{out}}/{one}" for one in "012"),
            "attn-plugins moa-evaluate --search {out}/0 --search {out}/1 --search {out}/2 --windows 6 --trials 5 "
            "--length 2048 --length 4096 --out {out}",
        ),
        {"{out}/evaluation.png": "moa_search.png"},
    ),
    "continue_tuning": example("continue_tune_vmoba.py --steps 200", "tuned.png", "continue_tuning.png"),
    "continue_tune_agent_vit": example("continue_tune_agent_vit.py", "tuned.png", "continue_tune_agent_vit.png"),
    "continue_tune_moh": example("continue_tune_moh.py", "tuned.png", "continue_tune_moh.png"),
    "continue_pretrain_bam": example("continue_pretrain_bam.py", "pretrained.png", "continue_pretrain_bam.png"),
    "continue_pretrain_bam_vit": example(
        "continue_pretrain_bam.py --vision", "pretrained.png", "continue_pretrain_bam_vit.png"
    ),
    "train_mip": example("train_mip.py", "tuned_sheet.png", "train_mip.png"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names
    unknown = sorted(set(names) - set(FIGURES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(FIGURES)}")
    for name in names:
        FIGURES[name].make(name)
    if not names:
        for name, figure in FIGURES.items():
            print(f"{name:26} {figure.takes:16} {figure.page}")


if __name__ == "__main__":
    main()
