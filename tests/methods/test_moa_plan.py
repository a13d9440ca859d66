"""Plans of spans: the published arithmetic one head at a time, files, shapes, patterns."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_plugins.methods.moa import MoAConfig, SpanPlan, load_plan
from attn_plugins.methods.moa.patterns import duo, per_layer, streaming, uniform

LENGTHS = (1, 64, 127, 128, 1000, 4096, 8191, 8192, 16384)


def drawn(seed: int, per: str = "query") -> SpanPlan:
    """Rules of the published kind: alphas in steps of 1,024, some of them negative, betas in eighths."""
    dice = random.Random(seed)
    kv_heads = dice.choice([1, 2, 4])
    query_heads = kv_heads * dice.choice([1, 2, 4])
    heads, layers = kv_heads if per == "kv" else query_heads, dice.randint(1, 4)
    alphas = [[dice.randrange(-2, 9) * 1024 for _ in range(heads)] for _ in range(layers)]
    betas = [[dice.randrange(9) / 8 for _ in range(heads)] for _ in range(layers)]
    return SpanPlan(alphas, betas, per, query_heads, kv_heads)  # type: ignore[arg-type]


def cache(alpha: float, beta: float, n: int) -> int:
    return math.ceil(max(min(int(alpha + beta * n), n), 128) / 64) * 64


@pytest.mark.parametrize("per", ["query", "kv"])
@pytest.mark.parametrize("seed", range(6))
def test_the_published_arithmetic(seed: int, per: str) -> None:
    plan = drawn(seed, per)
    rules = [list(zip(*rows, strict=True)) for rows in zip(plan.alphas, plan.betas, strict=True)]
    for n in LENGTHS:
        caches = [[cache(*rule, n) for rule in row] for row in rules]
        assert plan.spans(n).dtype == torch.int64
        assert plan.spans(n).tolist() == [[kept - 64 for kept in row] for row in caches]
        group = 1 if per == "kv" else plan.group
        rings = [[max(row[h * group : (h + 1) * group]) for h in range(plan.kv_heads)] for row in caches]
        assert plan.cache_lengths(n).tolist() == rings
        heads = [kept for row in caches for kept in row]
        assert plan.density(n) == pytest.approx(sum(min(kept, n) / n for kept in heads) / len(heads))
        assert plan.memory(n) == pytest.approx(sum(map(sum, rings)) / (n * plan.layers * plan.kv_heads))
        blocks, found = max(n // 64, 1), []
        for alpha, beta in (rule for row in rules for rule in row):
            band = max(int(alpha // 64 + beta * blocks), 1)
            found.append(min(band + 1, blocks) / blocks)
        assert plan.search_density(n) == pytest.approx(sum(found) / len(found))


def test_the_pairs_of_a_prefill_one_by_one() -> None:
    plan = SpanPlan(((100, 300), (0, 150)), ((0, 0), (1, 0.25)), "kv", 4, 2, sink=4)
    n = 333
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = [((j <= i) & ((j < 4) | (i - j < span))).sum().item() for span in plan.spans(n).flatten().tolist()]
    assert plan.pair_fraction(n) == pytest.approx(sum(seen) / len(seen) / (n * (n + 1) / 2))
    half = uniform(2, 4, beta=0.5)
    assert half.density(1 << 16) == 0.5
    assert half.pair_fraction(1 << 16) == pytest.approx(0.75, abs=1e-4)


def test_a_dense_rule_sees_all_at_any_length() -> None:
    plan = uniform(1, 2, beta=1.0)
    for n in (1, 63, 64, 65, 129, 1000):
        assert plan.spans(n).min() >= n - plan.sink
        assert plan.density(n) == plan.pair_fraction(n) == 1.0


def test_files(tmp_path: Any) -> None:
    plan = SpanPlan(((-1024, 0.5), (2048, 64)), ((1, 0.125), (0, 0)), "kv", 8, 2, 128, 32, "some model", {"loss": 0.25})
    found = load_plan(plan.save(tmp_path / "plan.json"))
    assert found == plan and dict(found.provenance) == {"loss": 0.25}
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan and hash(twin) == hash(plan)

    theirs = {"alphas": [[0, 1024], [64, 2048]], "betas": [[0.5, 0], [0, 0.25]]}
    (tmp_path / "moa.json").write_text(json.dumps(theirs))
    found = load_plan(tmp_path / "moa.json")
    assert (found.per, found.query_heads, found.sink, found.block) == ("query", 2, 64, 64)
    assert found.cache_lengths(8192).tolist() == [[4096, 1024], [128, 4096]]

    (tmp_path / "full_attention_heads.tsv").write_text("1.3\t0.2\n0.5\t-0.1\n")
    for sizes, path in (((128, 384), tmp_path / "full_attention_heads.tsv"), ((64, 192), tmp_path)):
        if sizes[0] == 64:
            (tmp_path / "config.json").write_text(json.dumps({"sink_size": 64, "recent_size": 128}))
        found = load_plan(path)
        assert (found.per, found.kv_heads, found.sink) == ("kv", 2, sizes[0])
        assert found.cache_lengths(1024).tolist() == [[1024, sizes[1]], [1024, sizes[1]]]


@pytest.mark.parametrize(
    ("text", "words"),
    [("nothing", "neither JSON"), ("[1]", "list"), ('{"alphas": [[1]]}', "betas"), ('{"x": 1}', "alphas and betas")],
)
def test_files_that_are_no_plans(tmp_path: Any, text: str, words: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_plan(tmp_path / "plan.json")


def test_a_newer_version_is_refused(tmp_path: Any) -> None:
    path = uniform(1, 2, beta=0.5).save(tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2"):
        load_plan(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphas": ((1, 2, 3),), "betas": ((0, 0, 0),)}, r"\(1, 3\)"),
        ({"betas": ((0, 0), (0, 0))}, r"\(2, 2\)"),
        ({"alphas": ((1,), (1, 2))}, "rows of"),
        ({"alphas": ((1, math.nan),)}, "finite"),
        ({"alphas": (1, 2)}, "row of numbers"),
        ({"query_heads": 3}, "no multiple"),
        ({"per": "head"}, "per='head'"),
        ({"block": 0}, "block=0"),
        ({"sink": -1}, "sink=-1"),
    ],
)
def test_bad_plans_are_named(options: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {"alphas": ((1, 2),), "betas": ((0, 0),), "per": "kv", "query_heads": 4, "kv_heads": 2}
    SpanPlan(**good)
    with pytest.raises(ValueError, match=words):
        SpanPlan(**{**good, **options})


def test_shapes_of_models() -> None:
    plan = SpanPlan(((1, 2),), ((0, 0),), "kv", 4, 2)
    llama = SimpleNamespace(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    assert plan.matches(llama) and plan.matches((1, 4, 2)) and plan.fitted(llama) == plan
    for other in ((2, 4, 2), (1, 8, 2), (1, 4, 4)):
        assert not plan.matches(other)
        with pytest.raises(ValueError, match=rf"1 layers of 4 query and 2 KV .* {other[0]} layers of {other[1]} query"):
            plan.fitted(other)
    told_by_query = SpanPlan(((1, 2, 3, 4),), ((0, 0, 0, 0),), "query", 4, 4)
    assert told_by_query.fitted((1, 4, 2)).cache_lengths(9).shape == (1, 2)
    assert not told_by_query.matches((1, 8, 4))
    told_by_kv = duo([[0.1, 0.9]])
    assert told_by_kv.fitted((1, 8, 2)).query_heads == 8
    assert not told_by_kv.matches((1, 8, 4))


def test_patterns() -> None:
    assert uniform(2, 4, 2, alpha=500).cache_lengths(4096).tolist() == [[512, 512]] * 2
    assert per_layer([0, 300], [0.25, 0], 4, 2).cache_lengths(4096).tolist() == [[1024] * 2, [320] * 2]
    exact = streaming(1, 4, 2, window=100, block=1)
    assert (exact.spans(4096).tolist(), exact.sink) == ([[100, 100]], 4)
    assert streaming(1, 4, window=100).spans(4096).unique().tolist() == [124]
    gates = [[0.2, 0.9, 0.4], [0.7, 0.1, 0.3]]
    assert (duo(gates).spans(4096) > 256).tolist() == [[False, True, False], [True, False, False]]
    assert (duo(gates, sparsity=0.5).spans(4096) > 256).tolist() == [[False, True, True], [True, False, False]]
    for call in (lambda: uniform(1, 2), lambda: streaming(1, 2, window=0), lambda: duo(gates, sparsity=2)):
        with pytest.raises(ValueError):
            call()


def test_options() -> None:
    assert MoAConfig(span=256).rule(3).spans(4096, 2) == (192, 192)
    assert MoAConfig(span=0.25, sink=0).rule(0).spans(4096, 1) == (1024,)
    assert MoAConfig(pattern="streaming", window=124).rule(0).spans(4096, 1) == (124,)
    assert MoAConfig(span=0.5, length=8192).rule(0).spans(100, 1) == (4032,)
    plan = drawn(1)
    config = MoAConfig.from_options(plan=plan, sink=128)
    assert config.plan.sink == 128
    assert MoAConfig.from_options(**config.to_options()) == config
    assert MoAConfig.from_options(plan=json.loads(json.dumps(config.to_options()["plan"]))).plan == config.plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no rule"),
        ({"span": 64, "window": 3}, "span, window"),
        ({"pattern": "streaming"}, "no rule"),
        ({"pattern": "strided", "span": 3}, "strided"),
        ({"span": -1}, "span=-1"),
        ({"span": 64, "granularity": "row"}, "'row'"),
        ({"span": 64, "granularity": "block", "sink": 4}, "multiples of 64"),
        ({"span": 64, "length": 0}, "length=0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoAConfig(**options)


def test_a_plan_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match="float"):
        MoAConfig(plan=3.5)
    with pytest.raises(FileNotFoundError):
        MoAConfig(plan="no_such_plan.json")
