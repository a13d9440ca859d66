"""Measuring a run by its handle: the numbers against brute force, the steps, and that nothing is left behind."""

from __future__ import annotations

import copy
import csv
import math
import pickle
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import attn_plugins
from attn_plugins import registry
from attn_plugins.measured_call import measured
from attn_plugins.measures import NAMES, NOTHING
from attn_plugins.method import AttentionCall, CausalKeys, Kept, Processor
from attn_plugins.sequence import Sequence
from tests.support import tiny_pipelines
from tests.support.live_bytes import LiveBytes
from tests.support.matrix import FULL, settings
from tests.support.snapshot import snapshot
from tests.support.tiny_models import MODELS, forward
from tests.support.windowed import Recording, Windowed, brute_force_mask, shrunk

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
CHOOSERS = [name for name in registry.method_names() if registry.method(name).kind == "sparse"]
GNA: dict[str, Any] = {"window": 2, "stride": 1, "min_tokens": 0, "dense_steps": 0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.build("wan")


def expected(call: AttentionCall, out: torch.Tensor) -> list[float]:
    """Recall, oracle (by single keys of the grid), density and relative L1 over all real rows, from whole masks."""
    assert call.sequence is not None
    sequence = call.sequence
    recall, oracle, kept_pairs, pairs, moved, whole = [], [], 0, 0, 0.0, 0.0
    for b in range(len(call.q)):
        item = sequence.item(b)
        mask = brute_force_mask(item, shrunk(item, 2), (1,) * len(item.grid))
        real = mask.any(-1)
        rows = real.nonzero()[:, 0].tolist()
        text = real.clone()
        text[item.text_before : item.text_before + item.tokens] = False
        for h in range(call.q.shape[1]):
            q, k, v = (t.double() for t in (call.q[b, h], call.k[b, h], call.v[b, h]))
            weights = (q @ k.T * (call.scale or q.shape[-1] ** -0.5)).masked_fill(~real, -math.inf).softmax(-1)
            dense = weights @ v.masked_fill(~real[:, None], 0)
            for row in rows:
                recall.append(float(weights[row, mask[row]].sum()))
                number = int((mask[row] & ~text).sum())
                best = weights[row, ~text].sort(descending=True).values[:number].sum() + weights[row, text].sum()
                oracle.append(float(best))
                kept_pairs += int(mask[row].sum())
                pairs += int(real.sum())
            moved += float((out[b, h, real].double() - dense[real]).abs().sum())
            whole += float(dense[real].abs().sum())
    return [sum(recall) / len(recall), sum(oracle) / len(oracle), kept_pairs / pairs, moved / whole]


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "flux"])
def test_all_rows_against_brute_force(name):
    """Guidance in two calls, a batch of two prompts with padding, joint text; every row is sampled."""
    pipe = tiny_pipelines.build(name)
    prompt = ["a", "an astronaut riding a horse"] if name == "hunyuan_video" else "a cat"
    with attn_plugins.patched(pipe, "gna", **GNA) as handle:
        recordings = {}
        for layer in handle.patches[0].layers:
            layer.processor = recordings[layer.name] = Recording(layer.processor)
            recordings[layer.name].kept = recordings[layer.name].inner.kept
        with handle.measure(rows=10**6) as measures:
            tiny_pipelines.run(name, pipe, steps=2, prompt=prompt)
    assert len(measures.layer_steps) == 2 * len(recordings)
    for row in measures.layer_steps:
        calls = recordings[row.layer].calls
        calls = calls[: len(calls) // 2] if row.step == 0 else calls[len(calls) // 2 :]
        assert row.calls == len(calls) > 0
        means = [sum(column) / len(calls) for column in zip(*(expected(*call) for call in calls), strict=True)]
        assert [getattr(row, measure) for measure in NAMES] == pytest.approx(means, abs=2e-6)
        assert row.recall <= row.oracle < 1 and row.density < 1


def test_a_sample_is_near_all_rows(pipe):
    found = []
    with attn_plugins.patched(pipe, "gna", **GNA) as handle:
        for rows in (12, 10**6, 12):
            with handle.measure(rows=rows) as measures:
                tiny_pipelines.run("wan", pipe)
            found.append(measures.grid("recall"))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[1], atol=0.1, rtol=0)


@pytest.mark.parametrize("name", FULL)
def test_a_setting_that_covers_everything_keeps_everything(pipe, name):
    method = Windowed() if name == "windowed" else name
    with attn_plugins.patched(pipe, method, **settings(name, full=True)) as handle:
        with handle.measure() as measures:
            tiny_pipelines.run("wan", pipe)
        for row in measures.layer_steps:
            assert row.relative_l1 < 1e-5
            if name in CHOOSERS:
                assert row.recall == row.density == 1 and row.oracle == pytest.approx(1, abs=1e-9)


def test_blocks_have_a_block_oracle(pipe):
    """Two blocks a row of single-key oracles would reach more than the best two blocks."""
    with attn_plugins.patched(pipe, "draft", pool=(1, 2), keep=2, min_tokens=0, dense_steps=0) as handle:
        layer = handle.patches[0].layers[0]
        inner, layer.processor = layer.processor, Recording(layer.processor)
        tiny_pipelines.run("wan", pipe, steps=1)
        call, out = layer.processor.calls[0]
    by_blocks = measured(call, out, inner, 10**6)
    single = Recording(inner)
    single.kept = lambda call, rows: as_keys(inner.kept(call, rows))
    by_keys = measured(call, out, single, 10**6)
    assert by_blocks.recall == pytest.approx(by_keys.recall) and by_blocks.density == by_keys.density
    assert by_blocks.recall <= by_blocks.oracle < by_keys.oracle - 1e-3


def as_keys(kept: Kept) -> Kept:
    return Kept(torch.arange(len(kept.unit_of)), kept.chosen[..., kept.unit_of])


def test_methods_that_choose_no_pairs_have_an_output_still(pipe):
    with attn_plugins.patched(pipe, Windowed(), min_tokens=0) as handle:
        with handle.measure() as measures:
            tiny_pipelines.run("wan", pipe)
        assert all(row.recall is row.oracle is row.density is None and row.relative_l1 > 0.01
                   for row in measures.layer_steps)  # fmt: skip
        assert measures.grid("recall").isnan().all()
        assert "recall" not in measures.summary() and "rel. L1" in measures.summary()


def test_steps_layers_and_tables(pipe, tmp_path):
    with attn_plugins.patched(pipe, "gna", **{**GNA, "dense_steps": 0.5}) as handle:
        assert handle.measures is None and "measured" not in handle.summary()
        for steps in (4, 6):
            with handle.measure(rows=8) as measures:
                tiny_pipelines.run("wan", pipe, steps=steps)
            assert measures.steps == steps
            assert [(row.layer, row.step, row.calls) for row in measures.layer_steps] == [
                (f"blocks.{layer}.attn1", step, 2) for layer in range(2) for step in range(steps // 2, steps)
            ], "guidance takes two calls a step; the first half is dense"
        assert handle.measures is measures and measures.summary() in handle.summary()
    recall = measures.grid("recall")
    assert recall.shape == (2, 6) and recall[:, :3].isnan().all() and not recall[:, 3:].isnan().any()
    table = measures.table().splitlines()
    assert [line.split()[:2] for line in table] == [
        ["layer", "steps"], ["blocks.0.attn1", "3-5"], ["blocks.1.attn1", "3-5"], ["all", "3-5"]
    ]  # fmt: skip
    assert f"{recall[0, 3:].mean():.1%}" in table[1] and f"{recall[:, 3:].mean():.1%}" in table[3]
    layer, step = divmod(int(recall.nan_to_num(1).argmin()), 6)
    assert f"least recall {recall[layer, step]:.1%} in blocks.{layer}.attn1, step {step}" in measures.summary()
    with measures.save(tmp_path / "run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and float(rows[1]["recall"]) == pytest.approx(float(recall[0, 4]), rel=1e-5)
    with pytest.raises(ValueError, match="recal.*recall, oracle"):
        measures.grid("recal")


def test_models_with_a_schedule_in_common_are_told_apart():
    from diffusers import WanPipeline

    base = tiny_pipelines.build("wan")
    second = tiny_pipelines.tiny_models.wan()
    pipe = WanPipeline(**{**base.components, "transformer_2": second}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    with attn_plugins.patched(pipe, "gna", **GNA) as handle, handle.measure(rows=8) as measures:
        tiny_pipelines.run("wan", pipe, steps=4)
    steps = [{row.step for row in measures.layer_steps if row.model == model} for model in (0, 1)]
    assert all(steps) and not steps[0] & steps[1] and steps[0] | steps[1] == {0, 1, 2, 3}
    assert "1: blocks.0.attn1" in measures.table() and measures.grid("recall").shape == (4, 4)


def test_a_language_model_counts_forwards():
    pytest.importorskip("transformers")
    from tests.support.tiny_language import tiny

    model = tiny("Qwen2").eval()
    tokens = torch.randint(5, 20, (1, 24), generator=torch.Generator().manual_seed(0))
    with attn_plugins.patched(model, "gna", window=6, stride=1) as handle, handle.measure() as measures:
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert {row.step for row in measures.layer_steps} == {0, 1, 2} and measures.steps == 3
    first = next(row for row in measures.layer_steps if row.step == 0)
    assert first.density == pytest.approx(sum(min(i + 1, 6) for i in range(24)) / sum(range(1, 25)))
    assert 0 < first.recall <= first.oracle < 1


def test_nothing_changes_and_nothing_is_left(pipe):
    dense = tiny_pipelines.run("wan", pipe)
    with attn_plugins.patched(pipe, "gna", **GNA) as handle:
        plain = tiny_pipelines.run("wan", pipe)
        before, layers = snapshot(pipe.transformer), [layer.processor for layer in handle.patches[0].layers]
        state = torch.random.get_rng_state()
        with handle.measure():
            assert torch.equal(tiny_pipelines.run("wan", pipe), plain)
            assert "window=2" in handle.summary()
        assert torch.equal(torch.random.get_rng_state(), state)
        with pytest.raises(RuntimeError, match="in mid run"), handle.measure() as measures:
            tiny_pipelines.run("wan", pipe, callback_on_step_end=fail)
        assert measures.steps == 1 and len(measures.layer_steps) == 2, "what was found before stays"
        assert snapshot(pipe.transformer) == before
        assert [layer.processor for layer in handle.patches[0].layers] == layers
    assert torch.equal(tiny_pipelines.run("wan", pipe), dense)


def fail(*_: Any) -> Any:
    raise RuntimeError("in mid run")


def test_unpatching_inside_the_block(pipe):
    dense = tiny_pipelines.run("wan", pipe)
    before = snapshot(pipe.transformer)
    with attn_plugins.patch(pipe, "gna", **GNA).measure() as measures:
        attn_plugins.unpatch(pipe)
        assert torch.equal(tiny_pipelines.run("wan", pipe), dense)
    assert snapshot(pipe.transformer) == before
    assert measures.table() == measures.summary() == NOTHING and measures.layer_steps == []


def test_refusals(pipe):
    with attn_plugins.patched(pipe, "gna", **GNA) as handle:
        for rows in (0, 2.5, True):
            with pytest.raises(ValueError, match="rows="), handle.measure(rows):
                pass
        with (
            handle.measure(),
            pytest.raises(ValueError, match="being measured already"),
            handle.measure(),
        ):
            pass
        with handle.measure() as measures:  # what was refused has not broken the first
            tiny_pipelines.run("wan", pipe)
        assert measures.layer_steps
    with pytest.raises(ValueError, match="taken out: patch again"), handle.measure():
        pass


def test_two_pipelines_at_once_do_not_mix(pipe):
    other = tiny_pipelines.build("flux")
    with attn_plugins.patched(pipe, "gna", **GNA) as one, attn_plugins.patched(other, "gna", **GNA) as two:
        with one.measure() as alone:
            tiny_pipelines.run("wan", pipe)
        with one.measure() as first, two.measure() as second:
            tiny_pipelines.run("flux", other, steps=3)
            tiny_pipelines.run("wan", pipe)
    assert first.layer_steps == alone.layer_steps and first.steps == 2
    assert second.steps == 3 and not {row.layer for row in second.layer_steps} & {
        row.layer for row in first.layer_steps
    }


def test_copies_made_inside_the_block_are_not_measured():
    model = MODELS["wan"].build()
    handle = attn_plugins.patch(model, "gna", **GNA)
    with handle.measure() as measures:
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in twins:
            forward(twin, MODELS["wan"].inputs(1, 0))
        assert not measures.layer_steps
    assert torch.equal(*(forward(each, MODELS["wan"].inputs(1, 0)) for each in twins))


def test_compiled_models_run_eagerly_meanwhile_and_stay_compiled():
    torch._dynamo.reset()
    counters.clear()
    model, inputs = MODELS["wan"].build(), MODELS["wan"].inputs(2, 0)
    handle = attn_plugins.patch(model, "gna", **GNA)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = forward(compiled, inputs)
    with handle.measure() as measures:
        torch.testing.assert_close(forward(compiled, inputs), out)
    with handle.measure() as eager:
        forward(model, inputs)
    assert measures.layer_steps == eager.layer_steps and measures.layer_steps
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(forward(compiled, inputs), out)
    assert counters["stats"]["unique_graphs"] == 1


def test_recomputed_calls_count_once():
    model, inputs = MODELS["wan"].build().train(), MODELS["wan"].inputs(1, 0)
    model.enable_gradient_checkpointing()
    with attn_plugins.patched(model, "gna", **GNA) as handle, handle.measure() as measures:
        model(**inputs)[0].square().sum().backward()
    assert {row.calls for row in measures.layer_steps} == {1}


class Everything(Processor):
    """Dense attention that says so."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept:
        self.asked = rows
        return Kept(torch.zeros(call.k.shape[2], dtype=torch.int64), torch.ones(1, 1, len(rows), 1, dtype=torch.bool))


def test_rows_that_nobody_asks_for_are_no_sample():
    """Text that gives keys and values alone stands in q as filling."""
    sequence = Sequence((4, 5), 3, 2, None, (0, 1))
    q, k, v = (torch.randn(2, 2, 25, 4) for _ in range(3))
    processor = Everything()
    call = AttentionCall(q, k, v, "joint", sequence)
    assert measured(call, processor(call), processor, 100) is not None
    assert processor.asked.tolist() == list(range(24)), "the last text token is padding in both items"
    call.asks = slice(3, 23)
    assert measured(call, processor(call), processor, 100) is not None
    assert processor.asked.tolist() == list(range(3, 23))


def test_a_call_of_padding_alone_is_not_measured():
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    keys = CausalKeys(torch.full((1, 5), -1), torch.tensor([-5]), torch.zeros(1, dtype=torch.int64))
    call = AttentionCall(q, k, v, "causal", causal=True, keys=keys)
    assert measured(call, q, Everything(), 8) is None


@pytest.mark.parametrize("bool_mask", [True, False])
def test_a_mask_is_part_of_dense_attention(bool_mask):
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    mask = mask if bool_mask else torch.where(mask, 0.3, -math.inf).double()
    call = AttentionCall(q, k, v, "cross", None, mask=mask)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    found = measured(call, out, Everything(), 100)
    assert found is not None and found.relative_l1 < 1e-12 and found.recall == 1


@pytest.mark.parametrize("name", [name for name in CHOOSERS if "self" in registry.method(name).sites])
def test_memory_is_a_few_rows_of_all_keys(name):
    method = registry.method(name)
    sequence = Sequence((4, 32, 64))
    q, k, v = (torch.randn(1, heads, sequence.tokens, 16) for heads in (2, 1, 1))
    processor = method.processor(method.config_class(), 2, 3, "self")
    call = AttentionCall(q, k, v, "self", sequence)
    measured(call, q, processor, 8)  # what is made once
    with LiveBytes((q, k, v)) as memory, torch.no_grad():
        measured(call, q, processor, 64)
    assert memory.peak < 64 * sequence.tokens * 80, "some ten tensors of 64 rows; N x N bools are 64 MiB"
