"""benchmarks/gpu.py from end to end on a CPU (its dry run), and the script of a session."""

import io
import re
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from benchmarks.gpu_cases import all_cases, chosen, windows
from benchmarks.gpu_suite import sweep
from benchmarks.gpu_suite.results import read

ROOT = Path(gpu.__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"


def dry_run(out, *options):
    text = io.StringIO()
    given = ["--device", "cpu", "--tiny", "--seconds", "0.001", "--out", str(out), *options]
    status = gpu.main(given, Console(file=text, width=200))
    return status, text.getvalue()


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_checks_measures_and_writes(tmp_path):
    before = files(ROOT / "benchmarks" / "results")
    status, text = dry_run(tmp_path / "gpu.csv", "--only", "wan-33k", "random-33k-0.1")
    assert status == 0 and "DRY RUN ON A CPU: the times below mean nothing" in text
    assert files(ROOT / "benchmarks" / "results") == before
    rows = read(tmp_path / "gpu.csv")
    assert {row["case"] for row in rows} == {"wan-33k", "random-33k-0.1"} and {r["gpu"] for r in rows} == {
        "none (dry run)"
    }
    by_side = {(row["case"], row["direction"], row["side"]): row for row in rows}
    for case in ("wan-33k", "random-33k-0.1"):
        for direction in ("fwd", "bwd", "fwd+bwd"):
            ours, dense = (by_side[case, direction, side] for side in ("ours", "sdpa"))
            assert float(ours["ms"]) > 0 and ours["baseline"] == "sdpa" and ours["baseline_ms"] == dense["ms"]
            assert float(ours["index_ms"]) >= 0 and 0 < float(ours["density"]) <= 1
            assert 0 <= float(ours["error"]) <= float(ours["allowed"]) and ours["note"] == "-"
        both = [float(by_side[case, direction, "ours"]["ms"]) for direction in ("bwd", "fwd+bwd")]
        assert both[0] < both[1]
    flex = by_side["wan-33k", "bwd", "flex"]  # it has no backward on a CPU: a -1 that says why
    assert flex["ms"] == "-1" and "backward" in flex["note"]
    assert float(by_side["wan-33k", "fwd", "flex"]["ms"]) > 0
    assert "# Block-sparse attention on none (dry run)" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    right = windows.neighborhood_attention

    def off_by_one(q, k, v, **options):
        return right(q, k, v, **{**options, "window": tuple(k - 1 if k > 1 else k for k in options["window"])})

    monkeypatch.setattr(windows, "neighborhood_attention", off_by_one)
    status, text = dry_run(tmp_path / "gpu.csv", "--only", "1d", "--forward-only")
    ours = next(row for row in read(tmp_path / "gpu.csv") if row["role"] == "ours")
    assert status == 1 and ours["ms"] == "-1" and ours["note"].startswith("WRONG: out is off by")
    assert "Wrong results (not timed): 1" in text and float(ours["error"]) > float(ours["allowed"])


def test_a_killed_run_keeps_its_rows(tmp_path, monkeypatch):
    real, calls = gpu.measure, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from real(*arguments)

    monkeypatch.setattr(gpu, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        dry_run(tmp_path / "gpu.csv", "--only", "wan", "--forward-only")
    assert {row["case"] for row in read(tmp_path / "gpu.csv")} == {"wan-33k"}


def test_out_of_memory_leaves_out_one_case(tmp_path, monkeypatch):
    real = gpu.measure

    def measure(case, *rest):
        if case.name == "wan-33k":
            raise torch.OutOfMemoryError("needs 1 TiB")
        yield from real(case, *rest)

    monkeypatch.setattr(gpu, "measure", measure)
    status, text = dry_run(tmp_path / "gpu.csv", "--only", "wan", "--forward-only")
    assert status == 0 and "out of memory" in text
    assert {row["case"] for row in read(tmp_path / "gpu.csv")} == {"wan-76k"}


def test_only_replaces_its_own_rows(tmp_path):
    dry_run(tmp_path / "gpu.csv", "--only", "1d", "--forward-only")
    dry_run(tmp_path / "gpu.csv", "--only", "random-33k-0.5", "--forward-only")
    assert [row["case"] for row in read(tmp_path / "gpu.csv") if row["role"] == "ours"] == ["1d-32k", "random-33k-0.5"]


def test_no_time_left_is_said(tmp_path):
    status, text = dry_run(tmp_path / "gpu.csv", "--only", "wan", "--minutes", "0.0000001")
    assert status == 1 and text.count("left out for lack of time") == 2 and not (tmp_path / "gpu.csv").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "cpu"], "dry run: it needs --tiny and --out"),
        (["--device", "cpu", "--tiny"], "dry run: it needs --tiny and --out"),
        ([], "no GPU that PyTorch can use"),
    ],
)
def test_nothing_is_measured_without_a_gpu(given, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        gpu.main(given, Console(file=io.StringIO()))


def test_a_sweep_tries_each_kernel_and_writes_nothing(tmp_path, monkeypatch, interpreted):
    monkeypatch.setattr(sweep, "candidates", lambda: [(16, 16, 4, 1), (32, 16, 4, 1)])
    status, text = dry_run(tmp_path / "gpu.csv", "--sweep", "--only", "random-33k-0.1")
    assert status == 0 and not list(tmp_path.iterdir())
    for kernel in ("forward", "grad_q", "grad_kv"):
        assert re.search(rf"random-33k-0.1 bf16 D16 {kernel}: best Config\(.*\) [0-9.]+ ms; in the table Config", text)


def test_the_list_of_cases():
    text = io.StringIO()
    assert gpu.main(["--list"], Console(file=text, width=160)) == 0
    assert all(case.name in text.getvalue() for case in all_cases())


def test_the_session_script_covers_every_case():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    parts = re.findall(r"--only ([a-z0-9 ]+) ;;", SCRIPT.read_text())
    found = [case.name for part in parts for case in chosen(all_cases(), part.split(), quick=False)]
    assert sorted(found) == sorted(case.name for case in all_cases())


def test_the_session_script_refuses_an_unknown_part(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT, "everything"],
        env={"OUT": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "unknown part everything" in done.stderr
