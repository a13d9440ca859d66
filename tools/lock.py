"""Compile the Triton kernels for every target and keep what came out: `python tools/lock.py [--check] [--only TEXT]`.

Without --check tests/triton/codegen.csv is written. With it nothing is written: named cases (or, without names, the
whole table) are compiled and compared, and the exit code is 1 where a kernel spills, does not fit its target, or is not
as locked (which only the Triton version that the lock names can say). A case is named "launch/target/dtype/head size",
as in "decode/sm_90/bf16/128". No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # for the processes too: interpreted kernels do not compile
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # so that a launch that leaves this to the default is told
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import Progress  # noqa: E402

from tests.support.codegen import (  # noqa: E402
    Case,
    Line,
    cases,
    changes,
    compile_case,
    faults,
    read_lock,
    write_lock,
)


def name_of(case: Case) -> str:
    return f"{case.launch}/{case.target}/{case.dtype}/{case.head_dim}"


def parse(name: str) -> Case:
    """A case from its name.

    Raises:
        ValueError: no case of that name is in the table.
    """
    launch, target, dtype, head_dim = name.rsplit("/", 3)
    case = Case(launch, target, dtype, int(head_dim))
    if case not in cases():
        raise ValueError(f"{name!r} is not in the table: launch/target/dtype/head size, as in decode/sm_90/bf16/128")
    return case


def compile_all(wanted: Sequence[Case], jobs: int) -> list[Line]:
    """Compile cases in `jobs` processes."""
    lines: list[Line] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, Progress() as progress:
        bar = progress.add_task("compiling", total=len(wanted))
        for done in as_completed([pool.submit(compile_case, case) for case in wanted]):
            lines += done.result()
            progress.advance(bar)
    return sorted(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases to check; none: the whole table")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is wrong")
    parser.add_argument("--only", default="", help="cases whose name contains this; the rest of the lock stays")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if options.names and not options.check:
        parser.error("a lock is written whole: names go with --check")
    import triton

    wanted = [parse(name) for name in options.names] or [case for case in cases() if options.only in name_of(case)]
    lines = compile_all(wanted, options.jobs)
    wrong = faults(lines)
    if not options.check:
        kept = []
        if options.only:
            version, locked = read_lock()
            if version != triton.__version__:
                parser.error(f"the lock is of Triton {version}, this is {triton.__version__}: lock the whole table")
            kept = [line for line in locked if line.case not in wanted and line.case in cases()]
        write_lock(triton.__version__, kept + lines)
        print(f"{len(lines)} kernels of {len(wanted)} cases locked for Triton {triton.__version__}")
    else:
        version, locked = read_lock()
        if version == triton.__version__:
            wrong += changes(lines, locked)
        else:
            print(f"the lock is of Triton {version}, this is {triton.__version__}: only spills and sizes are checked")
        print(f"{len(lines)} kernels of {len(wanted)} cases compiled")
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
