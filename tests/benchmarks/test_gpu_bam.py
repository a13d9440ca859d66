"""Soft attention experts in the GPU benchmark: the definition that the check goes by sees what is wrong."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.models.bam.attention import ExpertOutput
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.bam import CASES, LastPlace

SMALL = {
    name: next(case for case in CASES if case.name == f"bam-{name}").shrunk()
    for name in ("prefill-2k-each", "prefill-2k-shared", "step-8k-each", "step-8k-shared", "step-4k-shared-b8")
}


def prepared(name, dtype=torch.float32):
    return SMALL[name].prepare(Setting(dtype, 16, torch.device("cpu"), tiny=True))


def verdict(name, dtype=torch.float32, gradients=False):
    made = prepared(name, dtype)
    return made.oracle.judge(made.sides[-1].build().run, gradients)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_right_passes(name):
    """In bfloat16 by its own errors; in float32, where sums of few terms have luck of their own, near enough."""
    assert verdict(name, torch.bfloat16, gradients=True).right
    for error, _ in verdict(name, gradients=True).errors.values():
        assert error < 2e-5


@pytest.mark.parametrize("name", ["prefill-2k-each", "prefill-2k-shared", "step-8k-each", "step-8k-shared"])
def test_gates_of_the_wrong_experts_fail(name, monkeypatch):
    mix = ExpertOutput.forward

    def turned(self, heads, x):
        self.router.weight.data = self.router.weight.roll(1, 0)
        return mix(self, heads, x)

    monkeypatch.setattr(ExpertOutput, "forward", turned)
    assert not verdict(name, torch.bfloat16).right


@pytest.mark.parametrize("keys", ["each", "shared"])
def test_the_baseline_does_the_same_without_router_and_gates(keys, monkeypatch):
    """So that it is no other problem: with all gates at 1, ours is what it computes."""
    monkeypatch.setattr(ExpertOutput, "forward", lambda self, heads, x: self.o_proj(heads))
    for kind in ("prefill-2k", "step-8k"):
        made = prepared(f"{kind}-{keys}")
        dense, ours = (side.build().run for side in made.sides)
        torch.testing.assert_close(ours(*made.leaves), dense(*made.leaves), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["step-8k-each", "step-8k-shared"])
def test_a_step_that_does_not_write_its_key_fails(name, monkeypatch):
    monkeypatch.setattr(LastPlace, "update", lambda self, k, v, *_, **__: (self.keys, self.values))
    assert not verdict(name, torch.bfloat16).right


def test_heads_are_those_of_all_experts():
    for case in CASES:
        one = case.shrunk()
        assert case.heads == 64 and case.kv_heads == (4 if case.shared else 16)
        assert one.heads % one.kv_heads == 0 and one.decode == case.decode
