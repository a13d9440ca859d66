"""MoA on the GPU: prefill and steps at scale, rings as they fill and wrap, whole generations, one graph, no wait."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.ops.decode.rings import Rings
from attn_plugins.patches.caches import RingLayer
from attn_plugins.pipelines.benching.oracle import rounding_kernels
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.moa import CASES as PREFILL
from benchmarks.gpu_cases.moa_decoding import CASES as STEPS
from benchmarks.gpu_cases.moa_decoding import Replayed
from tests.gpu.test_sync import no_sync
from tests.support.moa import EVEN, UNEVEN, generated, greedy
from tests.support.tiny_language import prompt, tiny
from tests.support.tolerance import allowance, sdpa


def guard(place):
    """No wait for the device inside; a CPU has none."""
    return contextlib.nullcontext() if place.tiny else no_sync()


@pytest.mark.parametrize("case", [*PREFILL, *STEPS], ids=lambda case: case.name)
def test_every_case_of_the_benchmark_is_right(place, case, room):
    """Up to 32,768 tokens in bf16, prefill with all gradients; the definitions share nothing with the library."""
    room(16)
    case = case.shrunk() if place.tiny else case
    prepared = case.prepare(Setting(torch.bfloat16, case.head_dims[-1], place.device, place.tiny))
    for side in prepared.sides:
        if side.role != "dense" and side.name != "flex":
            verdict = prepared.oracle.judge(side.build().run, gradients=case.suite == "moa")
            assert verdict.right, (side.name, verdict.errors)


def test_a_replayed_step_has_the_bits_of_a_launched_one(place, on_gpu):
    prepared = next(case for case in STEPS if case.name == "decode-8b-8k-50-b1").prepare(
        Setting(torch.bfloat16, 128, place.device)
    )
    replayed = next(side for side in prepared.sides if side.name == "ours").build().run
    assert isinstance(replayed, Replayed)
    with torch.no_grad():
        launched = replayed.run(*prepared.leaves)
        assert torch.equal(replayed(*prepared.leaves), launched)
        prepared.leaves[0].mul_(-1)  # the same memory, other numbers: it computes, and does not remember
        assert torch.equal(replayed(*prepared.leaves), replayed.run(*prepared.leaves))
        assert not torch.equal(replayed(*prepared.leaves), launched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
def test_rings_are_masked_dense_attention_as_they_fill_and_wrap(place, dtype, padded):
    """A prompt, then token by token; spans differ inside a KV group. One item has padding in front."""
    prompt_length, steps, sink = (61, 9, 3) if place.tiny else (4093, 40, 64)
    unit = prompt_length // 8
    spans = [unit, 3 * unit, prompt_length + steps, unit, 2 * unit, 2 * unit, 7, prompt_length - 2]
    total = prompt_length + steps
    q, k, v = place.qkv(total, 64, dtype, heads=8, kv_heads=4, batch=2)
    first = torch.tensor([0, unit if padded else 0], device=place.device)
    at = torch.arange(total, device=place.device) - first[:, None]
    told = at[:, :prompt_length], (at >= 0)[:, :prompt_length] if padded else None
    rings = Rings(spans, sink, k, v)
    rings.write(k[:, :, :prompt_length], v[:, :, :prompt_length], told[0] if padded else 0, told[1])
    reach = torch.tensor(spans, device=place.device)[None, :, None]
    for n in range(prompt_length, total):
        now = slice(n, n + 1)
        where, real = (at[:, now], at[:, now] >= 0) if padded else (n, None)
        rings.write(k[:, :, now], v[:, :, now], where, real)
        found, _ = rings.attend(q[:, :, now], where, n + 1, None, place.backend)
        j = at[:, None, : n + 1]
        seen = ((j >= 0) & ((j < sink) | (at[:, None, now] - j < reach)))[:, :, None]
        parts = q[:, :, now], k[:, :, : n + 1], v[:, :, : n + 1]
        exact = sdpa(*(t.double() for t in parts), seen, None)
        with rounding_kernels(q):
            theirs = sdpa(*parts, seen, None)
        assert (found.double() - exact).abs().max().item() <= allowance(theirs, exact), n


@pytest.fixture(scope="module")
def reference():
    """By plan and padding: a model, a prompt, and what masked dense attention generates, in float64 on a CPU."""
    made = {}

    def ask(plan, left):
        key = id(plan), left
        if key not in made:
            model = tiny(head_dim=16)
            ids, mask = prompt(tokens=31, left=left)
            made[key] = model, ids, mask, *greedy(copy.deepcopy(model).double(), ids, mask, 9, plan)
        model, *rest = made[key]
        return copy.deepcopy(model), *rest

    return ask


OPTIONS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("plan", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("left", [(), (0, 7)], ids=["", "padded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_generate_on_the_device_is_masked_dense_attention(place, reference, plan, left, options):
    """Rings wrap in the prompt and while decoding. A key too many changes logits of size 10 by far more."""
    model, ids, mask, tokens, scores = reference(plan, left)
    model = model.to(place.device)
    attn_plugins.patch(model, "moa", plan=plan, backend=place.backend)
    out = generated(model, ids.to(place.device), mask.to(place.device), 9, **options)
    assert all(isinstance(layer, RingLayer) for layer in out.past_key_values.layers)
    torch.testing.assert_close(torch.stack(out.logits, 1).cpu().double(), scores, rtol=0, atol=1e-3)
    assert torch.equal(out.sequences.cpu(), tokens)


def test_compiled_generation_is_one_graph(place, reference):
    from transformers import CompileConfig

    model, ids, mask, tokens, scores = reference(UNEVEN, (0, 7))
    model = model.to(place.device)
    attn_plugins.patch(model, "moa", plan=UNEVEN, backend=place.backend)
    config = CompileConfig(fullgraph=True, backend="aot_eager" if place.tiny else "inductor", mode=None)
    config._compile_all_devices = True  # on a CPU, where generate would not
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "compile_config": config}
    out = generated(model, ids.to(place.device), mask.to(place.device), 9, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all steps
    torch.testing.assert_close(torch.stack(out.logits, 1).cpu().double(), scores, rtol=0, atol=1e-3)
    assert torch.equal(out.sequences.cpu(), tokens)


@pytest.mark.parametrize("told", ["on the host", "on the device"])
def test_a_step_over_rings_never_waits(place, told):
    """The ring of a dynamic cache, whose positions the host knows, and of a static one, which counts on the device."""
    total = 300
    q, k, v = place.qkv(total, 64, torch.bfloat16, heads=8, kv_heads=4)
    rings = Rings([20, 40] * 4, 4, k, v)
    rings.write(k, v, 0)
    if told == "on the device":
        rings.by_item()
    real = torch.ones(1, 1, dtype=torch.bool, device=place.device) if told == "on the device" else None

    def step(where):
        rings.write(k[:, :, -1:], v[:, :, -1:], where, real)
        return rings.attend(q[:, :, -1:], where, total + 2 if real is None else None, None, place.backend)

    at = [n if real is None else torch.tensor([[n]], device=place.device) for n in (total, total + 1)]
    step(at[0])  # compiles the kernels
    with guard(place):
        found, _ = step(at[1])
    assert bool(found.isfinite().all())


def test_a_step_of_a_patched_model_never_waits(place):
    """With a static ring cache; where the same step without a patch waits, that is transformers' own business."""
    from transformers import StaticCache

    model = tiny(head_dim=16).to(place.device)
    ids = prompt(tokens=31)[0].to(place.device)

    @torch.no_grad()
    def step_twice(cache):
        model(ids, past_key_values=cache, use_cache=True)
        token = ids[:, -1:].clone()
        model(token, past_key_values=cache, use_cache=True)  # compiles the kernels
        with guard(place):
            return model(token, past_key_values=cache, use_cache=True).logits

    try:
        dense = step_twice(StaticCache(config=model.config, max_cache_len=40))
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        pytest.skip(f"the unpatched model waits: {error}")
    attn_plugins.patch(model, "moa", plan=UNEVEN, backend=place.backend)
    cache = StaticCache(config=model.config, max_cache_len=40)
    model.generate.fill(cache, 40)
    assert not torch.allclose(step_twice(cache), dense, rtol=0, atol=1e-3)
    assert all(isinstance(layer, RingLayer) and layer.written is None for layer in cache.layers)
