"""benchmarks/unet.py from end to end on a tiny UNet, and the peers it holds."""

import csv
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from rich.console import Console

from benchmarks import unet
from benchmarks.unet_model import SDXL, TINY, random_inputs, random_unet
from benchmarks.unet_sides import ToDoProcessor, all_sides, tomesd

SIDES = ["dense", *unet.SIDES]


@pytest.fixture
def tiny():
    model = random_unet(TINY, torch.float32, "cpu")
    inputs = random_inputs(TINY, 64, 1, torch.float32, "cpu")

    def run():
        with torch.no_grad():
            return model(**inputs).sample

    return model, run


def test_a_dry_run_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)  # importing it fails, installed or not
    text = io.StringIO()
    given = ["--tiny", "--pixels", "512", "--rounds", "2", "--dtype", "fp32", "--out", str(tmp_path / "unet.csv")]
    unet.main(given, Console(file=text, width=200))
    with (tmp_path / "unet.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["side"] for row in rows] == SIDES
    assert "agent ratio=0.0625: " in text.getvalue()
    for row in rows:
        assert "" not in [value for name, value in row.items() if (name, row["side"]) != ("setting", "dense")]
        share, numbers = float(row["attention_share"]), {name: float(row[name]) for name in ("cost", "bound", "rel_l2")}
        assert 0 < share < 1 and float(row["noise_l2"]) == 0
        if row["side"].startswith("tomesd"):
            assert {row[name] for name in (*numbers, "side_ms", "speedup", "of_bound")} == {"-1"}
            continue
        assert float(row["speedup"]) == pytest.approx(float(row["dense_ms"]) / float(row["side_ms"]), abs=1e-2)
        assert numbers["bound"] == pytest.approx(1 / (1 - share + share * numbers["cost"]), abs=2e-3)
        least = 1 / 8 if row["side"] == "agent" else 1 / 4
        assert (numbers["cost"] == 1 and numbers["rel_l2"] == 0) if row["side"] == "dense" else (
            least < numbers["cost"] < 0.6 and 0.01 < numbers["rel_l2"] < 1  # of two levels, one is patched
        )  # fmt: skip


def test_a_clock_that_runs_apart_as_on_a_gpu(tiny):
    said = []
    options = unet.arguments(["--tiny", "--rounds", "1", "--dtype", "fp32", "--sides", "todo"])
    bench = unet.Bench(tiny[0], options, 512, said.append)
    bench.clock_apart = True
    dense, todo = bench.rows()
    assert len(said) == bench.forwards == 5
    assert dense["noise_l2"] == "0" and dense["attention_share"] == todo["attention_share"] > 0
    bench.clock_apart = False
    assert [row["noise_l2"] for row in bench.rows()] == [-1, -1] and bench.forwards == 4


def test_each_side_leaves_the_unet_as_it_was(tiny, monkeypatch):
    model, run = tiny
    seen = []
    stand_in = SimpleNamespace(apply_patch=lambda *_, **options: seen.append(options), remove_patch=seen.append)
    monkeypatch.setitem(sys.modules, "tomesd", stand_in)
    before, processors = run(), model.attn_processors
    kept = {name: type(one) for name, one in processors.items()}
    for side in all_sides(64, 1024):
        with side.apply(model):
            assert torch.equal(run(), before) == (side.name in ("dense", "tomesd", "tomesd_deeper")), side.name
        assert torch.equal(run(), before), side.name
        assert model.attn_processors == processors and {n: type(p) for n, p in processors.items()} == kept
    assert seen == [dict(ratio=0.5, max_downsample=1), model, dict(ratio=0.5, max_downsample=2), model]


def test_tomesd_leaves_sdxls_levels_alone_by_default(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", SimpleNamespace(apply_patch=lambda *_, **__: 0, remove_patch=id))
    costs = []
    for most in (1, 2, 4):
        with tomesd("", 128, max_downsample=most).apply(torch.nn.Identity()) as cost:
            costs.append((cost(64 * 64), cost(32 * 32)))
    assert costs == [(1.0, 1.0), (0.25, 1.0), (0.25, 0.25)]


def test_todo_reads_every_other_token():
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8).double()
    x = torch.randn(1, 8 * 8, 16, dtype=torch.float64)
    few = x.unflatten(1, (8, 8))[:, 1::2, 1::2].flatten(1, 2)
    dense, expected = attention(x), attention(x, encoder_hidden_states=few)
    inner = attention.processor
    attention.set_processor(ToDoProcessor(inner, 2, least=64))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-13)
    assert (expected - dense).abs().max() > 1e-3
    attention.set_processor(ToDoProcessor(inner, 2, least=65))
    assert torch.equal(attention(x), dense)


def test_the_clock_times_self_attention_alone(tiny):
    clock = unet.AttentionClock("cpu")
    with clock:
        tiny[1]()
    calls = [tokens for tokens, _ in clock.calls]
    assert {tokens: calls.count(tokens) for tokens in calls} == {1024: 5, 256: 12}  # blocks: 2 + 3, and 4 + 2 + 6
    assert all(took > 0 for took in clock.by_tokens().values())


def test_the_shape_is_sdxls():
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
    assert sum(p.numel() for p in model.parameters()) == 2_567_463_684
