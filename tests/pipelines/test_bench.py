"""The benchmark from end to end on a CPU, tiny: every mask by every backend, wrong results, files, options."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from attn_plugins.pipelines import bench
from attn_plugins.pipelines.benching import columns, memory, network, plots, table, timing
from attn_plugins.pipelines.benching.backends import flash_attention, registry, sdpa
from attn_plugins.pipelines.benching.masks import MASKS, Shape
from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.plans import interval_plan
from attn_plugins.pipelines.benching.results import read
from attn_plugins.pipelines.benching.sides import Cannot, Setting
from attn_plugins.pipelines.cli import app
from attn_plugins.pipelines.comparing.measure_files import can_plot
from attn_plugins.plan.gpu_tiles import KV_STEP, Q_STEP

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = {"lengths": (256,), "head_dims": (16,), "kv_heads": 2, "seconds": 0.0, "rounds": (1, 1), "tiny": True}
CPU = Setting(torch.float32, 16, torch.device("cpu"), tiny=True)
FLEX = ("prefix_lm_causal", "block_sparse", "moa_spans", "gna", "vmoba")  # a kind of mask function each
NEVER = {"sdpa_efficient", "sdpa_cudnn", "flash_attn", "flash_attn_3", "natten"}  # on a CPU, or not installed


def measured(tmp_path, **options):
    said = []
    bench.run(bench.BenchSettings(**{**TINY, **options}), tmp_path / "bench.csv", say=said.append)
    rows = read(tmp_path / "bench.csv", columns.COLUMNS)
    return {(row["mask"], row["dtype"], row["direction"], row["backend"]): row for row in rows}, said


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Forward in bf16, all masks and backends; and with gradients in fp32, some of them."""
    folder = tmp_path_factory.mktemp("bench")
    without_flex = tuple(name for name in registry.BACKENDS if name != "flex")
    found, said = measured(folder, dtypes=("bf16",), backends=without_flex)
    by_flex, more = measured(folder, dtypes=("bf16",), backends=("flex",), masks=FLEX)
    ours = ("ours_plan", "ours_operator")
    trained, rest = measured(folder, backward=True, backends=ours)
    return found | by_flex | trained, [*said, *more, *rest], folder / "bench.csv"


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_is_right_wherever_it_runs(everything, mask):
    rows = [row for key, row in everything[0].items() if key[0] == mask]
    assert not [row["reason"] for row in rows if row["reason"].startswith("WRONG")]
    for row in rows:
        ran = float(row["ms"]) > 0
        assert ran == (row["reason"] == "-") and row["backend"] not in (NEVER if ran else ())
        if ran:
            assert 0 <= float(row["error"]) <= float(row["allowed"])
            assert float(row["p20_ms"]) <= float(row["ms"]) <= float(row["p80_ms"])
            assert float(row["executed"]) == -1 or float(row["executed"]) >= float(row["density"]) - 1e-4
            assert float(row["index_ms"]) >= 0 and float(row["baseline_ms"]) > 0
    ours = [row for row in rows if row["backend"].startswith("ours") and float(row["ms"]) > 0]
    if mask != "agent":  # its check takes as many KV heads as heads
        assert {row["direction"] for row in ours} == {"fwd", "bwd", "fwd+bwd"}


def test_agents_are_right_too(tmp_path):
    found, _ = measured(tmp_path, masks=("agent",), backends=("ours_operator", "flex"), kv_heads=4, backward=True)
    for direction in ("fwd", "bwd", "fwd+bwd"):
        assert float(found["agent", "fp32", direction, "ours_operator"]["ms"]) > 0
        assert found["agent", "fp32", direction, "flex"]["reason"] == "another function than masked attention"


def test_what_nobody_can_do_has_a_reason(everything):
    found = everything[0]
    reasons = {key[3]: row["reason"] for key, row in found.items() if key[:3] == ("sliding", "bf16", "fwd")}
    assert reasons["sdpa_flash"] == "its only option is causal" and reasons["natten"] == "windows on a grid only"
    assert reasons["sdpa_documents"] == "no documents that do not see each other"
    assert found["causal", "bf16", "fwd", "sdpa_cudnn"]["reason"] == "not on a CPU"
    assert not [line for line in everything[1] if "WRONG" in line]


def test_the_figures_of_a_row(everything):
    found = everything[0]
    row = found["causal", "bf16", "fwd", "sdpa_flash"]
    pairs = 256 * 257 / 2
    assert float(row["density"]) == pytest.approx(pairs / 256**2, rel=1e-4)
    assert float(row["useful_gflop"]) == pytest.approx(4e-9 * 16 * 4 * pairs, rel=1e-4)
    assert float(row["executed_gflop"]) == pytest.approx(4e-9 * 16 * 4 * 256**2 * float(row["executed"]), rel=1e-3)
    assert float(row["useful_gflops"]) == pytest.approx(1e3 * float(row["useful_gflop"]) / float(row["ms"]), rel=1e-3)
    speedup = float(row["baseline_ms"]) / float(row["ms"])
    assert float(row["speedup"]) == pytest.approx(speedup, rel=1e-3)
    assert float(row["share"]) == pytest.approx(speedup, rel=1e-3)  # a causal mask against causal attention
    other = found["document", "bf16", "fwd", "ours_plan"]
    assert float(other["share"]) == pytest.approx(float(other["speedup"]) * float(other["density"]), rel=1e-3)
    both = [float(found["sliding", "fp32", d, "ours_plan"]["useful_gflop"]) for d in ("fwd", "bwd", "fwd+bwd")]
    assert both[1] == pytest.approx(2.5 * both[0], rel=1e-3) and both[2] == pytest.approx(3.5 * both[0], rel=1e-3)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    right = registry.block_sparse_attention
    monkeypatch.setattr(registry, "block_sparse_attention", lambda *t, **more: right(*t, **more) * 1.02)
    found, said = measured(tmp_path, masks=("sliding",), backends=("ours_plan", "sdpa_mask"))
    row = found["sliding", "fp32", "fwd", "ours_plan"]
    assert row["reason"].startswith("WRONG: out is off by") and row["ms"] == "-1" and "WRONG" in said[0]
    assert float(found["sliding", "fp32", "fwd", "sdpa_mask"]["ms"]) > 0


@pytest.mark.parametrize("mask", ["share_question", "block_sparse"])
def test_plans_for_a_gpu_run_on_its_kernels(mask, interpreted):
    """Interpreted: row intervals and lists as the kernels read them, with gradients."""
    one = MASKS[mask].make(Shape(140, 2, 1))
    leaves = one.leaves(CPU)
    plan = one.plan(CPU, ()) if mask == "block_sparse" else interval_plan(one.intervals, one.edges, Q_STEP, KV_STEP)
    run = lambda q, k, v: registry.block_sparse_attention(q, k, v, plan, backend="triton")  # noqa: E731
    assert one.oracle(leaves).judge(run, gradients=True).right


@pytest.mark.parametrize("mask", ["share_question", "global_sliding", "causal"])
def test_a_wrong_mask_does_not_pass(mask):
    """The check goes by the rule, the backends by the intervals: moved by a token, they no longer agree."""
    one = MASKS[mask].make(Shape(256, 2, 2))
    leaves = one.leaves(CPU)
    keys = torch.arange(256)
    seen = one.rows(torch.arange(1), keys)[0]
    moved = seen.roll(1, 0)
    for table_, is_right in ((seen, True), (moved, False)):
        run = lambda q, k, v, t=table_: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=t)  # noqa: E731
        assert SampledAttention(leaves, one.rows).judge(run, gradients=False).right is is_right


def test_a_length_without_a_grid_is_minus_one(tmp_path):
    found, said = measured(tmp_path, masks=("gna", "full"), lengths=(257,), backends=("ours_plan", "ours_operator"))
    row = found["gna", "fp32", "fwd", "ours_operator"]
    assert "257 tokens are no grid" in row["reason"] and row["ms"] == row["density"] == "-1"
    assert float(found["full", "fp32", "fwd", "ours_plan"]["ms"]) > 0 and "no grid" in said[0]


def test_resuming_leaves_out_what_is_there(tmp_path, monkeypatch):
    settings = bench.BenchSettings(**{**TINY, "masks": ("full", "document"), "backends": ("ours_plan",)})
    about = bench.describe(torch.device("cpu")) | {"commit": "abc"}
    monkeypatch.setattr(bench, "describe", lambda device: about)
    calls = []
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda job, *more: calls.append(job.mask) or real(job, *more))
    out = tmp_path / "bench.csv"
    bench.run(settings, out)
    bench.run(settings, out, resume=True)
    assert calls == ["full", "document"]
    bench.run(bench.BenchSettings(**{**TINY, "masks": ("document", "causal"), "backends": ("ours_plan",)}), out, True)
    assert calls[2:] == ["causal"]
    about["commit"] = "abd"
    bench.run(settings, out, resume=True)
    assert calls[3:] == ["full", "document"]
    rows = read(out, columns.COLUMNS)
    assert {row["mask"]: row["commit"] for row in rows} == {"full": "abd", "document": "abd", "causal": "abc"}
    said = []
    bench.run(settings, out, minutes=1e-9, say=said.append)
    assert [line.split(":")[0] for line in said] == ["left out for lack of time"] * 2 and len(calls) == 5


def test_table_and_plots_come_from_the_file_alone(everything, tmp_path):
    path = everything[2]
    rows = read(path, columns.COLUMNS)
    text = table.markdown(rows)
    assert text == table.markdown(rows) and "## 256 tokens, forward, bf16, 4 heads on 2, head size 16" in text
    forward = text.split("## ")[1]
    assert all(f"| `{name}` |" in forward for name in MASKS) and "natten |" not in forward
    wrong = next(row for row in rows if row["mask"] == "sliding" and row["backend"] == "sdpa_mask")
    other = next(row for row in rows if row["mask"] == "full" and row["backend"] == "sdpa_mask")
    assert "| wrong |" in table.markdown([other, {**wrong, "ms": "-1", "reason": "WRONG: out is off"}])
    assert table.markdown([]) == "No rows.\n"
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text(
        "".join(
            line
            for line in lines
            if line.startswith("mask,") or line.startswith(("full,", "sliding,")) and ",bf16," in line
        )
    )
    written = bench.draw(tmp_path / "b.csv")
    few = [row for row in rows if row["mask"] in ("full", "sliding") and row["dtype"] == "bf16"]
    assert written[0].read_text() == f"# Masked attention\n\n{table.markdown(few)}"
    assert [one.name for one in written[1:]] == ["b.png"] * can_plot() and all(
        one.stat().st_size > 0 for one in written
    )
    with pytest.raises(ValueError, match="no such file"):
        bench.draw(tmp_path / "c.csv")
    page = tmp_path / "page.md"
    page.write_text("# A page\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nthe end\n")
    assert bench.draw(tmp_path / "b.csv", page)[0] == page
    inside = f"# A page\n<!-- bench:begin -->\n{table.markdown(few, level=3)}<!-- bench:end -->\nthe end\n"
    assert page.read_text() == inside and (tmp_path / "pictures" / "b.png").exists() == can_plot()
    page.write_text("# A page")
    with pytest.raises(ValueError, match="there are no lines"):
        bench.draw(tmp_path / "b.csv", page)


def test_the_page_has_the_tables_of_the_file():
    rows = read(ROOT / "benchmarks" / "results" / "bench_cpu.csv", columns.COLUMNS)
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    assert f"<!-- bench:begin -->\n{table.markdown(rows, level=3)}<!-- bench:end -->" in page
    assert not [row for row in rows if str(row["reason"]).startswith("WRONG")]
    assert "\n".join(network.table()) in page
    assert all(f"`{name}`" in page for name in (*MASKS, *registry.BACKENDS))


def test_a_panel_for_each_mask(everything):
    pytest.importorskip("matplotlib")
    rows = [row for row in read(everything[2], columns.COLUMNS) if row["dtype"] == "bf16" and row["mask"] > "mm"]
    titles = [axes.get_title() for axes in plots.figure(rows).axes if axes.get_title()]
    assert titles == [name for name in MASKS if name > "mm"]


def test_numbers_in_cells():
    assert [table.short(value) for value in (-1.0, 0.0, 0.0123, 0.5, 2.345, 99.94, 1234.6)] == [
        "-1", "0", ".0123", ".5", "2.35", "99.9", "1,235"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": ("casual",)}, "mask 'casual': legal are full, causal"),
        ({"backends": ("flux",)}, "backend 'flux': legal are sdpa_flash"),
        ({"dtypes": ("fp8",)}, "dtype 'fp8': legal are bf16, fp16, fp32"),
        ({"heads": 3, "kv_heads": 2}, "3 heads over 2 KV heads"),
        ({"lengths": (0,)}, r"lengths=\(0,\)"),
        ({"device": "cuda"}, "sees no GPU here"),
    ],
)
def test_settings_refuse(options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        bench.BenchSettings(**options)


def test_the_command(tmp_path):
    def run(*arguments, code=0):
        found = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
        assert found.exit_code == code, found.output + repr(found.exception)
        return found

    out = tmp_path / "new" / "bench.csv"
    ours = ["--backends", "ours_plan,sdpa_documents", "--masks", "document", "--head-dim", "8", "--heads", "2"]
    text = run(*ours, "--lengths", "96", "--seconds", "0", "--rounds", "1", "--device", "cpu", "--out", str(out)).output
    assert "wrote" in text and "bench.md" in text
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["backend"] for row in rows] == ["ours_plan", "sdpa_documents"] and float(rows[0]["extra_mib"]) >= -1
    assert "bench.md" in run("--plot", "--out", str(out)).output
    error = run("--masks", "casual", "--out", str(out), code=2).stderr
    assert "legal are full" in error and len(error.strip().splitlines()) == 1
    assert "ends in .csv" in run("--masks", "full", "--out", str(tmp_path / "bench.md"), code=2).stderr
    assert "--lengths 2q" in run("--lengths", "2q", code=2).stderr
    assert bench.quick(bench.BenchSettings()).lengths == bench.QUICK


def test_flash_attention_in_its_own_words(monkeypatch):
    """The package is not here: what it would be called with, and that its output goes back where it came from."""
    calls = []

    def attend(q, k, v, *ends, causal, window_size):
        calls.append((q.shape, [t.tolist() for t in ends if isinstance(t, torch.Tensor)], causal, window_size))
        return q

    module = types.SimpleNamespace(flash_attn_func=attend, flash_attn_varlen_func=attend)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    gpu = Setting(torch.float32, 8, torch.device("meta"))
    q = torch.randn(2, 4, 96, 8)
    cpu = lambda *shape, device, **more: torch.tensor(*shape, **more)  # noqa: E731
    monkeypatch.setattr(flash_attention, "torch", types.SimpleNamespace(tensor=cpu, int32=torch.int32))
    for name in ("causal_sliding", "document"):
        mask = MASKS[name].make(Shape(96, 4, 4, 2))
        assert torch.equal(flash_attention.build("flash_attn", mask, gpu, (q, q, q)).run(q, q, q), q)
    shape, ends, causal, window = calls[0]
    assert (tuple(shape), ends, causal, window) == ((2, 96, 4, 8), [], True, (11, 0))
    shape, ends, causal, window = calls[1]
    lengths = mask.told.documents
    assert tuple(shape) == (192, 4, 8) and not causal and window == (-1, -1) and ends[0] == ends[1]
    assert ends[0][-1] == 192 and ends[0][len(lengths)] == 96 and ends[0][1] == lengths[0]
    with pytest.raises(Cannot, match="its options are"):
        flash_attention.build("flash_attn", MASKS["global_sliding"].make(Shape(96)), gpu, (q, q, q))


def test_what_the_kernel_of_a_cpu_computes():
    """ATen takes slices of queries, and of the keys of a causal call whole steps of 512."""
    full, causal = (sdpa.forced("sdpa_flash", one, CPU, (torch.zeros(1, 1, 1024, 8),) * 2).density for one in (0, 1))
    assert full == 1.0 and causal == (512 * 512 + 512 * 1024) / 1024**2
    with pytest.raises(Cannot, match="scores would take 4.0 GiB"):
        sdpa.forced("sdpa_math", False, CPU, (torch.zeros(1, 1, 1, 1).expand(1, 4, 16384, 8),) * 2)


def test_memory_of_a_call_on_a_cpu():
    found = memory.peak_mib(lambda: (torch.ones(1 << 24) + 1).sum(), torch.device("cpu"), resident=True)
    assert found == -1.0 or 100 < found < 200  # two tensors of 64 MiB, one of which may go before the other is whole
    assert memory.peak_mib(lambda: None, torch.device("cpu")) == -1.0


def test_caches_are_flushed_before_the_clock_starts():
    watch = timing.stopwatch(torch.device("cpu"), cold=True)
    assert watch._flush.numel() == 2 * timing.cache_bytes() >= 1 << 16
    watch.start()
    assert int(watch._flush[0]) == 1 and len(watch._marks) == 1
    assert timing.stopwatch(torch.device("cpu"))._flush.numel() == 0
