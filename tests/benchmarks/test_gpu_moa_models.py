"""benchmarks/gpu_moa.py from end to end on a tiny Llama, and that its sides decode the same text."""

import csv

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import gpu_moa
from benchmarks.gpu_moa_sides import COMPILED, SIDES, cache_bytes, cache_of, entered, fill, random_llama, spread_plan

TINY = ["--tiny", "--device", "cpu", "--models", "8b", "--tokens", "400", "--steps", "2", "--rounds", "2"]


def dry_run(path, *more):
    gpu_moa.main([*TINY, "--out", str(path), *more])
    if not path.read_text():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_dry_run_measures_and_writes(tmp_path):
    rows = dry_run(tmp_path / "moa.csv", "--batches", "1", "2", "largest", "--most", "3")
    assert [(row["side"], row["batch"], row["batches"]) for row in rows] == [
        (side.name, batch, batches)
        for batch, batches in (("1", "equal"), ("2", "equal"), ("3", "largest"))
        for side in SIDES
    ]
    plan = spread_plan(2, 4, 2, 0.5, seed=0)
    for row in rows:
        assert "" not in row.values() and row["note"] == "-" and row["rounds"] == "2" and row["layers"] == "2"
        rate = 1e3 * int(row["batch"]) / float(row["step_ms"])
        assert float(row["tokens_per_s"]) == pytest.approx(rate, rel=1e-2)
        assert (float(row["prefill_ms"]) > 0) == (row["batch"] == "1")
        assert float(row["plan_memory"]) == pytest.approx(plan.memory(400), abs=1e-4)
        bound = float(row["bytes_bound"])
        assert bound > 1.1 if row["side"] == "moa" else bound == pytest.approx(1, abs=0.02)
    rates = {row["side"]: float(row["tokens_per_s"]) for row in rows[:3]}
    assert float(rows[2]["of_static"]) == pytest.approx(rates["moa"] / rates["static"], abs=2e-3)
    assert float(rows[2]["of_dynamic"]) == pytest.approx(rates["moa"] / rates["dynamic"], abs=2e-3)


def test_what_a_side_cannot_do_is_a_note_and_the_others_go_on(tmp_path, monkeypatch):
    real = gpu_moa.cache_of

    def cache(model, side, length):
        if side.name == "static":
            raise torch.OutOfMemoryError("no memory left")
        return real(model, side, length)

    monkeypatch.setattr(gpu_moa, "cache_of", cache)
    rows = {row["side"]: row for row in dry_run(tmp_path / "moa.csv", "--batches", "1")}
    assert rows["static"]["note"] == "OutOfMemoryError: no memory left"
    assert {rows["static"][name] for name in ("tokens_per_s", "of_static", "bytes_bound", "gb_per_s")} == {"-1", "-1.0"}
    assert float(rows["moa"]["tokens_per_s"]) > 0 and rows["moa"]["of_static"] == "-1"
    rows = dry_run(tmp_path / "moa.csv", "--batches", "largest", "--most", "2")
    assert [(row["batch"], row["note"]) for row in rows] == [("2", "-"), ("0", "not one item fits"), ("2", "-")]


def test_no_time_left_is_said(tmp_path, capsys):
    assert dry_run(tmp_path / "moa.csv", "--minutes", "0") == []
    assert capsys.readouterr().out.count("left out for lack of time") == 3


@pytest.mark.parametrize("given", [["--device", "cpu"], ["--device", "cpu", "--tiny"], []])
def test_nothing_is_measured_without_a_gpu(given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="dry run|no GPU"):
        gpu_moa.main(given)


@pytest.mark.parametrize("most", [1, 2, 5, 8, 11])
def test_the_largest_batch(most):
    for room in range(13):
        asked = []

        def fits(batch, room=room, asked=asked):
            asked.append(batch)
            return batch <= room

        assert gpu_moa.largest(fits, most) == min(room, most)
        assert max(asked) <= most and len(asked) == len(set(asked))


def logits(model, side, plan):
    """Of two tokens behind 600 random ones, three items."""
    with torch.no_grad(), entered(model, side, plan) as step:
        cache = cache_of(model, side, 660)
        fill(model, cache, 3, 600)
        token = torch.tensor([[3], [4], [5]])
        outs = [step(input_ids=token, past_key_values=cache, use_cache=True).logits for _ in range(2)]
    return torch.cat(outs, dim=1), cache_bytes(cache)


def test_all_sides_decode_the_same_text():
    """With a plan that keeps everything they agree, in float32; with half of it the rings see less, and are smaller."""
    model = random_llama("8b", None, 660, True, torch.float32, "cpu")
    model.apply(lambda module: module.weight.data.mul_(15) if isinstance(module, torch.nn.Linear) else None)
    everything, half = (spread_plan(2, 4, 2, share, seed=1) for share in (1.0, 0.5))
    expected, dense = logits(model, SIDES[0], everything)
    for side in (*SIDES, *COMPILED):
        found, _ = logits(model, side, everything)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    found, held = logits(model, SIDES[2], half)
    assert not torch.allclose(found, expected, rtol=0, atol=0.1 * expected.abs().max().item())
    assert held < 0.7 * dense


@pytest.mark.parametrize(("kv_heads", "share"), [(8, 0.5), (8, 0.25), (3, 0.5), (32, 0.75), (2, 1.0)])
def test_a_spread_plan_has_its_share_in_each_layer_and_heads_that_differ(kv_heads, share):
    plan = spread_plan(4, 96, kv_heads, share, seed=3)
    for row in plan.betas:
        assert sum(row) / kv_heads == pytest.approx(share) and all(0 < beta <= 1 for beta in row)
    assert share == 1 or all(len(set(row)) > 1 for row in plan.betas)
    assert plan == spread_plan(4, 96, kv_heads, share, seed=3)
    assert share == 1 or plan != spread_plan(4, 96, kv_heads, share, seed=4)
    assert plan.memory(16384) == pytest.approx(share, abs=0.01)


def test_a_share_that_no_plan_has_is_refused():
    with pytest.raises(ValueError, match="share=1.5: legal is"):
        spread_plan(2, 4, 2, 1.5, seed=0)
