"""Timing, clocks, rows, files and the table of the GPU benchmark, on made-up numbers."""

import subprocess

import pytest
import torch

from attn_plugins.pipelines.benching import clocks, cold, environment, memory
from attn_plugins.pipelines.benching.timing import WallStopwatch, interleaved, spread
from attn_plugins.plan.neighborhood import cached_neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence
from benchmarks.gpu_suite.columns import COLUMNS, derived, rounded
from benchmarks.gpu_suite.join import join
from benchmarks.gpu_suite.results import Results, read
from benchmarks.gpu_suite.summary import ours_ran, summary
from benchmarks.gpu_suite.sweep import candidates, tried
from benchmarks.gpu_suite.table import markdown


class FakeWatch(WallStopwatch):
    """Counts calls; every phase takes as long as the side says."""

    now = 0.0

    def start(self):
        self._marks = [self.now]

    def mark(self):
        self._marks.append(self.now)


def test_sides_take_turns_and_phases_are_kept():
    watch, log = FakeWatch(), []

    def side(name, *phases):
        def call(mark):
            log.append(name)
            for i, ms in enumerate(phases):
                watch.now += ms / 1e3
                if i < len(phases) - 1:
                    mark()

        return call

    samples = interleaved({"a": side("a", 1.0, 2.0), "b": side("b", 4.0)}, watch, seconds=0, least=4)
    assert log == list("ab" + "ab" + "ba" + "ab" + "ba")  # warm-up, then rounds that begin with another side
    assert [len(column) for column in samples["a"]] == [4, 4] and len(samples["b"]) == 1
    assert spread(samples["a"][1]).ms == pytest.approx(2.0) and spread(samples["b"][0]).ms == pytest.approx(4.0)


@pytest.mark.parametrize(("seconds", "least", "most", "rounds"), [(0, 5, 9, 5), (60, 2, 9, 9)])
def test_rounds_are_bounded(seconds, least, most, rounds):
    samples = interleaved({"a": lambda mark: None}, FakeWatch(), seconds, least, most)
    assert len(samples["a"][0]) == rounds
    assert interleaved({}, FakeWatch(), 0) == {}


def test_the_spread_is_of_quantiles():
    found = spread([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.ms, found.low, found.high, found.rounds) == (3.5, 2.0, 5.0, 6)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1980, 2619, 651.24, 55", clocks.Clocks(1980.0, 2619.0, 651.24, 55.0)),
        ("210, 405, [N/A], 31", clocks.Clocks(210.0, 405.0, -1.0, 31.0)),
        ("", clocks.Clocks()),
        ("an error message", clocks.Clocks()),
    ],
)
def test_clocks_from_nvidia_smi(line, expected):
    assert clocks.parse(line) == expected


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_clocks_that_nobody_knows_are_minus_one(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert clocks.driver() == "-1" and clocks.read(torch.device("cpu")) == clocks.Clocks()
    columns = clocks.both(clocks.Clocks(), clocks.Clocks(1.0, 2.0, 3.0, 4.0))
    assert columns["sm_mhz_before"] == -1.0 and columns["temperature_c_after"] == 4.0 and len(columns) == 8


def test_the_environment_of_a_dry_run(monkeypatch):
    about = environment.describe(torch.device("cpu"))
    assert set(about) <= set(COLUMNS) and about["gpu"] == "none (dry run)" and about["torch"] == torch.__version__
    monkeypatch.setenv("ATTN_PLUGINS_COMMIT", "abc1234")
    assert environment.describe(torch.device("cpu"))["commit"] == "abc1234"
    assert environment.slug("NVIDIA H200 (141 GB)") == "nvidia_h200_141_gb"
    assert memory.peak_mib(lambda: None, torch.device("cpu")) == -1.0


def test_a_cold_call_makes_its_plan_anew():
    axes = axis_windows((8, 8), (3, 3))
    arguments = (Sequence((8, 8)), axes, (4, 4), (2, 2))
    kept = cached_neighborhood_plan(*arguments)
    assert cached_neighborhood_plan(*arguments) is kept
    cold.forget_plans()
    assert cached_neighborhood_plan(*arguments) is not kept
    assert cold.wall_ms(lambda: None, torch.device("cpu")) >= 0


def row(side="ours", role="ours", ms=2.0, direction="fwd", case="hunyuan", **more):
    about = {
        "suite": "block_sparse", "case": case, "shape": "8", "option": "window 2", "tokens": 8, "head_dim": 64,
        "dtype": "bf16", "direction": direction, "side": side, "role": role, "ms": ms, "density": 0.25, "work": 0.2,
        "index_ms": 2.0, "pass": 0.8, "aim": 0.9, "note": "", "gpu": "Some GPU", "commit": "abc",
    }  # fmt: skip
    found = {**about, **more}
    return {**found, **derived(found, "cudnn", 7.0)}


def test_derived_figures():
    found = row(ms=2.0)
    assert found["speedup"] == 3.5 and found["share"] == 0.875 and found["share_of_work"] == pytest.approx(0.7)
    assert found["share_one_call"] == pytest.approx(0.25 * 7 / 4)
    missing = row(ms=-1.0)
    assert all(missing[name] == -1.0 for name in ("speedup", "share", "share_one_call", "share_of_work"))
    assert row(density=-1.0)["share"] == -1.0 and row(density=-1.0)["speedup"] == 3.5


def test_a_row_has_all_columns_and_no_blank():
    found = rounded(row())
    assert tuple(found) == COLUMNS and "" not in found.values() and found["natten"] == -1 and found["note"] == "-"
    with pytest.raises(ValueError, match="typo"):
        rounded({"typo": 1})


def test_rows_are_in_the_file_at_once_and_replace_their_predecessors(tmp_path):
    path = tmp_path / "new" / "gpu.csv"
    results = Results(path)
    results.add(row(ms=2.0))
    results.add(row("flex", "peer", ms=3.0))
    assert [found["ms"] for found in read(path)] == ["2", "3"]
    later = Results(path, keep=True)
    later.add(row(ms=1.5))
    later.add(row(case="wan"))
    assert [(found["case"], found["ms"]) for found in read(path)] == [
        ("hunyuan", "1.5"),
        ("hunyuan", "3"),
        ("wan", "2"),
    ]
    Results(path).add(row())
    assert len(read(path)) == 1 and [p.name for p in path.parent.iterdir()] == ["gpu.csv"]


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "gpu.csv"
    path.write_text("case,ms\nhunyuan,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Results(path, keep=True)


ROWS = [
    row("cudnn", "dense", ms=7.0, density=1.0),
    row("flex", "peer", ms=1.9),
    row(ms=2.0),
    row(ms=2.3, direction="bwd", **{"pass": 0.7, "aim": 0.8}),
    row(ms=1.9, case="wan"),
    row(ms=9.0, case="slow"),
    row(ms=-1.0, case="broken", note="WRONG: dk is off by 3.00e-01, allowed 1.00e-02; not timed"),
    row(ms=2.0, direction="fwd+bwd", **{"pass": -1.0, "aim": -1.0}),
]


def test_the_summary_names_what_falls_short():
    found = summary(ROWS)
    assert [line.split(":")[0] for line in found["Below the pass mark"]] == [
        "slow bf16 D64 fwd", "broken bf16 D64 fwd"
    ]  # fmt: skip
    assert [line.split(":")[0] for line in found["Passed, below the aim"]] == [
        "hunyuan bf16 D64 fwd", "hunyuan bf16 D64 bwd"
    ]  # fmt: skip
    assert found["At the aim"] == ["wan bf16 D64 fwd: 92.1% of ideal (mark 80%, aim 90%)"]
    assert found["Slower than dense"] == ["slow bf16 D64 fwd: 9 ms, dense 7 ms (cudnn)"]
    assert found["Slower than a peer"] == ["hunyuan bf16 D64 fwd: 2 ms, flex 1.9 ms"]
    assert len(found["Wrong results (not timed)"]) == 1
    assert not ours_ran(ROWS) and ours_ran(ROWS[:5])
    assert ours_ran([row("flex", "peer", ms=-1.0, note="WRONG: out")])  # a peer's fault is shown, but is not ours


def test_the_table_comes_from_the_file_alone(tmp_path):
    results = Results(tmp_path / "gpu.csv")
    for one in ROWS:
        results.add(one | {"sm_mhz_before": 1980.0, "sm_mhz_after": 1755.0})
    text = markdown(read(tmp_path / "gpu.csv"), "A title")
    assert text == markdown(results.rows, "A title")
    assert text.startswith("# A title\n") and "gpu Some GPU" in text and "1755 to 1980 MHz" in text
    forward = text.split("## fwd\n")[1].split("##")[0]
    assert "| 7 | cudnn | flex 1.9 | 2 (" in forward and "0.875" in forward and forward.count("\n| ") == 6
    assert "## fwd+bwd" in text and "**Slower than dense: 1**" in text and "**At the aim: 1**" in text


def test_parts_of_a_session_join(tmp_path):
    for name, case in (("a", "hunyuan"), ("b", "wan")):
        Results(tmp_path / f"{name}.csv").add(row(case=case))
    table = join([tmp_path / f"{name}.csv" for name in "abc"], tmp_path / "all.csv")
    assert [found["case"] for found in read(tmp_path / "all.csv")] == ["hunyuan", "wan"]
    assert "Some GPU" in table.read_text()
    with pytest.raises(ValueError, match="none of"):
        join([tmp_path / "c.csv"], tmp_path / "all.csv")


def test_a_sweep_ranks_what_runs():
    def time_one(config):
        if config == (64, 64, 4, 2):
            raise RuntimeError("out of resource: shared memory")
        return float(config[0])

    trials = tried([(128, 64, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2)], time_one)
    assert [trial.ms for trial in trials] == [32.0, 128.0, -1.0] and "shared memory" in trials[-1].note
    found = candidates()
    assert len(set(found)) == len(found) >= 20 and all(m * n < 16384 or warps == 8 for m, n, warps, _ in found)
