"""MoA's cases of the GPU benchmark: the definitions that the check goes by see what is wrong."""

import pytest
import torch

from attn_plugins.ops import decode_attention, span_attention
from attn_plugins.ops.decode.layout import Layout
from attn_plugins.pipelines.benching.contest import timed_call
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.moa import CASES as PREFILL
from benchmarks.gpu_cases.moa_decoding import CASES as STEPS
from benchmarks.gpu_cases.moa_decoding import Replayed
from benchmarks.gpu_cases.moa_definition import positions_by_place, slots_by_head
from tests.support.spoiled import Spoiled


def small(cases, name):
    return next(case for case in cases if case.name == name).shrunk()


MIXED, GROUPED = (small(PREFILL, f"moa-{model}-8k-mixed") for model in ("7b", "8b"))
STEP, GROUPED_STEP, UNEVEN = (
    small(STEPS, name) for name in ("decode-7b-8k-25-b8", "decode-8b-8k-50-b1", "decode-8b-16k-uneven-b8")
)


def prepared(case, dtype=torch.float32):
    return case.prepare(Setting(dtype, 16, torch.device("cpu"), tiny=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [MIXED, GROUPED, STEP, GROUPED_STEP, UNEVEN], ids=lambda case: case.name)
def test_what_is_right_passes_with_all_gradients(case, dtype):
    made = prepared(case, dtype)
    sides = [side for side in made.sides if side.role != "dense" and side.name != "flex"]
    assert {"ours"} <= {side.name for side in sides} <= {"ours", "ours, positions"}
    for side in sides:
        verdict = made.oracle.judge(side.build().run, gradients=True)
        assert verdict.right, (side.name, verdict.errors)
        assert list(verdict.errors) == ["out", "dq", "dk", "dv"]


def spans(case, changed=lambda spans: spans, **options):
    def run(q, k, v):
        return span_attention(q, k, v, **{"spans": changed(list(case.spans)), "sink": case.sink} | options)

    return run


def spoiled(run, which):
    return lambda *leaves: run(*(Spoiled.apply(t) if i == which else t for i, t in enumerate(leaves)))


def step(case, changed=lambda ranges: ranges, turn=lambda *t: t, positions=True):
    """Our step by hand, with something of it changed."""
    group = case.heads // case.kv_heads
    rings = [max(case.spans[first : first + group]) for first in range(0, case.heads, group)]
    layout = Layout.of([ring + case.sink for ring in rings])
    ranges = torch.tensor(layout.ranges())[None]
    table = torch.full((1, layout.total + 1), 2**31 - 1)
    for head, ring in enumerate(rings):
        for place, position in enumerate(positions_by_place(case.tokens, case.sink, ring).tolist()):
            table[0, layout.slot(head, place)] = position
    rule = {
        "key_positions": table, "spans": list(case.spans),
        "query_positions": torch.tensor([[case.tokens - 1]]), "sink": case.sink,
    }  # fmt: skip

    def run(q, keys, values, *_):
        q, keys, values = turn(q, keys, values)
        return decode_attention(q, keys, values, ranges=changed(ranges.clone()), **(rule if positions else {}))

    return run


def moved(which, by):
    def change(ranges):
        ranges[..., which] += by
        return ranges

    return change


def nan_elsewhere(*leaves):
    out = step(STEP)(*leaves).clone()
    out[0, 0, 0, 3] = float("nan")  # of an item that is not compared
    return out


def swapped_items(q, keys, values):
    return q, keys.flip(0), values.flip(0)


def test_the_helpers_of_this_file_are_right():
    """So that what fails below fails for what was changed."""
    for case, run in ((MIXED, spans(MIXED)), (GROUPED, spans(GROUPED)), (STEP, step(STEP)), (UNEVEN, step(UNEVEN))):
        assert prepared(case).oracle.judge(run, gradients=True).right


WRONG = {
    "a span too long by one": (MIXED, spans(MIXED, lambda spans: [spans[0] + 1, spans[1]]), "out"),
    "spans of the wrong heads": (GROUPED, spans(GROUPED, lambda spans: spans[::-1]), "out"),
    "a sink too few": (MIXED, spans(MIXED, sink=MIXED.sink - 1), "out"),
    "all keys": (MIXED, spans(MIXED, lambda spans: [MIXED.tokens] * 2), "out"),
    "the scale": (GROUPED, spans(GROUPED, scale=16**-0.51), "out"),
    "dk of one token": (MIXED, spoiled(spans(MIXED), 1), "dk"),
    "dv of one token": (MIXED, spoiled(spans(MIXED), 2), "dv"),
    "a slot too few": (STEP, step(STEP, moved(1, -1)), "out"),
    "the slot of another head": (STEP, step(STEP, moved(0, 1), positions=False), "out"),
    "the caches of other heads": (STEP, step(STEP, lambda ranges: ranges.flip(1)), "out"),
    "the caches of other items": (STEP, step(STEP, turn=swapped_items), "out"),
    "one ring for all heads of a group": (UNEVEN, step(UNEVEN, positions=False), "out"),
    "nan in what is not compared": (STEP, nan_elsewhere, "out"),
    "dk of one slot": (STEP, spoiled(step(STEP), 1), "dk"),
    "dv of one slot": (STEP, spoiled(step(STEP), 2), "dv"),
}


@pytest.mark.parametrize(("case", "run", "where"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails(case, run, where):
    verdict = prepared(case).oracle.judge(run, gradients=True)
    error, allowed = verdict.errors[where]
    assert not verdict.right and not error <= allowed


@pytest.mark.parametrize("kept", [[600, 512, 40], [1, 511], [700, 700], [1200]], ids=str)
def test_the_places_of_heads_are_those_of_the_library(kept):
    layout = Layout.of(kept)
    for head, slots in enumerate(slots_by_head(kept)):
        assert slots.tolist() == [layout.slot(head, place) for place in range(kept[head])]


@pytest.mark.parametrize(("tokens", "sink", "ring"), [(20, 3, 5), (8, 3, 5), (9, 0, 4), (13, 4, 9), (31, 1, 1)])
def test_slots_are_those_of_tokens_written_one_by_one(tokens, sink, ring):
    held = [-1] * (sink + ring)
    for p in range(tokens):
        held[p if p < sink else sink + (p - sink) % ring] = p
    assert positions_by_place(tokens, sink, ring).tolist() == held


@pytest.mark.parametrize("case", [MIXED, GROUPED, *(case.shrunk() for case in PREFILL[1:2])], ids=lambda c: c.name)
def test_the_share_of_pairs_is_that_of_the_mask(case):
    heads = torch.arange(case.heads)
    mask = prepared(case).oracle.mask_rows(heads, torch.arange(case.tokens))
    assert case.pair_share == pytest.approx(mask.sum().item() / (case.heads * case.tokens * (case.tokens + 1) / 2))


@pytest.mark.parametrize("case", [STEP, GROUPED_STEP, UNEVEN], ids=lambda case: case.name)
def test_the_share_of_bytes_is_that_of_the_tensors(case):
    leaves = prepared(case).leaves
    assert case.density == pytest.approx((leaves[1].shape[1] - 1) / (case.kv_heads * case.tokens))


@pytest.mark.parametrize("case", [STEP, GROUPED_STEP], ids=lambda case: case.name)
def test_every_dense_side_is_attention_over_all_tokens(case):
    """Grouped, growing or neither: the baseline is no other problem."""
    made = prepared(case)
    q, _, _, k, v = made.leaves
    wide = (t.double().repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), *wide)
    dense = [side for side in made.sides if side.role == "dense"]
    assert [side.name for side in dense] == ["sdpa", *["sdpa grouped"] * (case is GROUPED_STEP), "growing"]
    for side in dense:
        torch.testing.assert_close(side.build().run(*made.leaves).double(), exact, rtol=0, atol=1e-5)


def test_the_causal_baseline_is_causal():
    made = prepared(GROUPED)
    dense = next(side for side in made.sides if side.role == "dense").build()
    everything = spans(GROUPED, lambda spans: [GROUPED.tokens] * 2)
    out = timed_call(dense, made, gradients=False)(lambda: None)
    torch.testing.assert_close(out, everything(*made.leaves), rtol=0, atol=1e-5)


def test_a_call_with_gradients_is_not_replayed():
    q = torch.randn(1, 2, 1, 4, requires_grad=True)
    assert torch.equal(Replayed(lambda t: 2 * t)(q), 2 * q)


def test_the_promised_problems_are_there():
    heads = {(32, 32), (32, 8)}
    found = {(case.heads, case.kv_heads, case.tokens, case.name.split("-")[-1]) for case in PREFILL}
    assert found == {(*h, n, plan) for h in heads for n in (8192, 16384, 32768) for plan in ("mixed", "eighth")}
    steps = {(case.heads, case.kv_heads, case.tokens, case.plan, case.batch) for case in STEPS}
    assert {(*h, n, p, b) for h in heads for n in (8192, 16384, 32768) for p in ("50", "25") for b in (1, 8)} < steps
    assert all(case.head_dims == (128,) for case in (*PREFILL, *STEPS))
    assert {case.density for case in STEPS} == {0.5, 0.25, 0.75}
    assert all(case.pair_share == pytest.approx(0.24, abs=0.02) for case in PREFILL if "eighth" in case.name)
