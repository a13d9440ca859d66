"""Check, then measure, block-sparse attention on this GPU beside dense attention, compiled flex attention and NATTEN.

    python benchmarks/gpu.py                   everything: a CSV and a Markdown table under benchmarks/results/
    python benchmarks/gpu.py --quick           the problems marked so, one head size, within five minutes
    python benchmarks/gpu.py --only hunyuan wan   cases whose names begin so; their rows replace those in the file
    python benchmarks/gpu.py --sweep           which kernel configuration is fastest here; writes no results
    python benchmarks/gpu.py --list            names of the cases

docs/gpu.md says how to read the table. A wrong result is not timed. The exit status is 1 if ours was wrong or did not
run anywhere. -1: not measured, and the column `note` says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.pipelines.benching import environment  # noqa: E402
from attn_plugins.pipelines.benching.contest import Budget  # noqa: E402
from attn_plugins.pipelines.benching.sides import DTYPE_NAMES, Setting  # noqa: E402
from benchmarks.gpu_cases import all_cases, chosen  # noqa: E402
from benchmarks.gpu_suite.case import Case  # noqa: E402
from benchmarks.gpu_suite.measure import measure  # noqa: E402
from benchmarks.gpu_suite.results import Results  # noqa: E402
from benchmarks.gpu_suite.summary import ours_ran, summary  # noqa: E402
from benchmarks.gpu_suite.table import markdown  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cases marked so, at the larger head size")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases or suites whose names begin so")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--dims", nargs="+", type=int, help="head sizes; by default each case's own")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--seconds", type=float, help="of timed rounds, a direction (default 2, quick 1)")
    parser.add_argument("--minutes", type=float, help="begin no further case after so many; what is left out is named")
    parser.add_argument("--out", type=Path, help="the CSV file; the table goes beside it")
    parser.add_argument("--sweep", action="store_true", help="try the kernel configurations instead")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # with --device cpu: a dry run
    return parser.parse_args(given)


def plan(options: argparse.Namespace, device: torch.device) -> list[tuple[Case, Setting]]:
    """What is measured, case by case; the larger head size first, so that a run cut short has what matters most."""
    jobs = []
    for case in chosen(all_cases(), options.only, options.quick):
        case = case.shrunk() if options.tiny else case
        dims = sorted(options.dims or case.head_dims, reverse=True)
        for dtype in options.dtypes:
            for dim in dims[:1] if options.quick and not options.dims else dims:
                jobs.append((case, Setting(DTYPES[dtype], dim, device, options.tiny)))
    return jobs


def run(options: argparse.Namespace, console: Console) -> int:
    device = torch.device(options.device)
    about = environment.describe(device)
    default = f"gpu_{environment.slug(about['gpu'])}{'_quick' if options.quick else ''}.csv"
    results = Results(options.out or RESULTS / default, keep=bool(options.only))
    budget = Budget(options.seconds or (1.0 if options.quick else 2.0), least=2 if options.tiny else 7)
    jobs = plan(options, device)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    end = time.monotonic() + 60 * (options.minutes or 1e9)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for case, setting in jobs:
            label = f"{case.name} {DTYPE_NAMES[setting.dtype]} D{setting.head_dim}"
            progress.update(task, description=label)
            if time.monotonic() > end:
                progress.console.print(f"left out for lack of time: {label}", highlight=False)
            else:
                _one(case, setting, budget, results, about, options, progress.console, label)
            progress.advance(task)
    table = results.path.with_suffix(".md")
    table.write_text(markdown(results.rows, f"Block-sparse attention on {about['gpu']}"), encoding="utf-8")
    for heading, found in summary(results.rows).items():
        console.print(f"[bold]{heading}: {len(found) or 'none'}[/bold]")
        for text in found:
            console.print(f"  {text}", highlight=False, markup=False)
    console.print(f"{results.path} and {table.name}", highlight=False)
    return 0 if results.rows and ours_ran(results.rows) else 1


def _one(case, setting, budget, results, about, options, console, label) -> None:  # type: ignore[no-untyped-def]
    console.print(label, highlight=False)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    try:
        for row in measure(case, setting, budget, not options.forward_only, say):
            results.add(row | about)
            if row["role"] == "ours":
                say(
                    f"  {row['direction']:8s} dense {row['baseline_ms']:.3g} ms, ours {row['ms']:.3g} ms, speed-up "
                    f"{row['speedup']:.3g}, {row['share']:.2f} of ideal"
                )
    except torch.OutOfMemoryError as error:
        say(f"  out of memory, this case is left out: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()


def main(given: list[str] | None = None, console: Console | None = None) -> int:
    options = arguments(given)
    console = console or Console(width=160)
    if options.list:
        for case in all_cases():
            console.print(f"{case.name:26s} {case.suite}: {case.shape}, {case.option}", highlight=False)
        return 0
    if options.device == "cpu":
        if not (options.tiny and options.out):
            raise SystemExit("--device cpu is a dry run: it needs --tiny and --out (its times are no results)")
        console.print("[bold red]DRY RUN ON A CPU: the times below mean nothing and are no results.[/bold red]")
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use: nothing to measure (torch.cuda.is_available() is False)")
    if options.sweep:
        from benchmarks.gpu_suite.sweep import sweep

        return sweep(options, console)
    return run(options, console)


if __name__ == "__main__":
    raise SystemExit(main())
