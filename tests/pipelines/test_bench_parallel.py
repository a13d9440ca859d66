"""Context parallelism: processes agree with one, the bytes that they send are those of the formula, and the bound."""

from __future__ import annotations

import pytest

from attn_plugins.pipelines.benching import network, parallel
from attn_plugins.pipelines.benching.network import Layer, Machine


@pytest.fixture(scope="module")
def found():
    return parallel.check(2, tokens=96, heads=4, kv_heads=2, head_dim=8)


def test_processes_agree_with_one(found):
    assert found.right and set(found.errors) == {"out", "dq", "dk", "dv"} and "right" in found.line


def test_the_bytes_are_those_of_the_formula(found):
    assert found.sent == [(found.expected, found.expected)] * 2
    assert found.expected == 4 * 96 * 8 * 2 * (4 + 2) / 4


def test_a_wrong_result_is_told():
    assert "WRONG" in parallel.Exchanged(2, {"out": (2.0, 1.0)}, [(1, 1)], 1.0).line


def test_heads_that_cannot_be_shared():
    with pytest.raises(ValueError, match="4 heads on 2 cannot be shared by 4 devices"):
        parallel.check(4, 96, 4, 2, 8)


def test_the_bound():
    machine = Machine("round", nvlink=100.0, network=10.0, peak=1000.0, attention=0.5)
    layer = Layer(tokens=1000, heads=16, kv_heads=16, head_dim=100, density=0.5)
    whole = 2 * 1000 * 100 * 64
    assert layer.sent(8) == whole * 7 / 64 and layer.sent(1) == 0
    one = network.estimate(layer, 8, machine)
    assert one.exchange_ms == pytest.approx(1e3 * layer.sent(8) / 100e9)
    assert one.attention_ms == pytest.approx(1e3 * 4 * 100 * 0.5 * 1e6 * 16 / 8 / 500e12)
    two = network.estimate(layer, 16, machine)  # 8 of 15 peers are in the other node, and the network is the slower way
    assert two.exchange_ms == pytest.approx(1e3 * layer.sent(16) * 8 / 15 / 10e9)
    assert 0 < one.share < 1 and network.estimate(layer, 1, machine).exchange_ms == 0


def test_the_table_has_minus_one_for_what_cannot_be_shared():
    lines = list(network.table())
    assert (
        len(lines) == 2 + len(network.SHAPES) * len(network.DEVICES) and len({line.count("|") for line in lines}) == 1
    )
    assert any(line.startswith("| 64 heads on 8, density 0.5 | 16 | -1") for line in lines)
