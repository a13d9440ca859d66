"""Agent attention's cases of the GPU benchmark: the definition that the check goes by sees what is wrong."""

import math

import pytest
import torch

from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import pool_tokens
from attn_plugins.pipelines.benching.contest import timed_call
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.agent import CASES, AgentCase
from tests.support.spoiled import Spoiled

FREE = next(case for case in CASES if case.name == "agent-4k").shrunk()
TRAINED = next(case for case in CASES if case.name == "agent-deit-197").shrunk()


def prepared(case, dtype=torch.float32):
    return case.prepare(Setting(dtype, 16, torch.device("cpu"), tiny=True))


def run_of(case, **changes):
    """Our side with some of its arguments changed."""
    before = case.tokens - case.side**2
    usual = {"scale_broadcast": 16**-0.5} if case.trained else {"scale_broadcast": 16**-0.15, "shortcut": 0.075}
    pool = changes.pop("pool", pool_tokens)

    def run(q, k, v, _, bias_aggregate=None, bias_broadcast=None, dwc_weight=None, dwc_bias=None):
        given = {
            "bias_aggregate": bias_aggregate, "bias_broadcast": bias_broadcast, "dwc_weight": dwc_weight,
            "dwc_bias": dwc_bias, "grid": case.grid if case.trained else None,
        }  # fmt: skip
        agents = pool(q, case.grid, case.to, before)
        changed = {name: change(given.get(name)) if callable(change) else change for name, change in changes.items()}
        return agent_attention(q, k, v, agents, **{**usual, **given, **changed}, backend="cpu")

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [FREE, TRAINED], ids=lambda case: case.name)
def test_what_is_right_passes(case, dtype):
    made = prepared(case, dtype)
    sides = {side.name: side for side in made.sides if side.role != "dense"}
    assert set(sides) == {"two sdpa", "agents given", "ours"}
    for side in sides.values():
        verdict = made.oracle.judge(side.build().run, gradients=True)
        assert verdict.right, (side.name, verdict.errors)
        assert {"out", "dq", "dq of other rows", "dk", "dv", "dv of other rows"} <= set(verdict.errors)
        assert ("dbias_aggregate" in verdict.errors) == ("ddwc_bias" in verdict.errors) == case.trained


def test_the_helper_of_this_file_is_right():
    """So that what fails below fails for what was changed."""
    for case in (FREE, TRAINED):
        assert prepared(case).oracle.judge(run_of(case), gradients=True).right


def larger(*arguments):
    return 1.02 * pool_tokens(*arguments)


def detached(q, *rest):
    return pool_tokens(q.detach(), *rest)


def shifted(q, grid, to, before):
    return pool_tokens(q.roll(1, 2), grid, to, before)


def spoiled(which):
    def run(*leaves):
        return run_of(FREE)(*(Spoiled.apply(t) if i == which else t for i, t in enumerate(leaves)))

    return run


def nan_elsewhere(*leaves):
    out = run_of(FREE)(*leaves).clone()
    out[0, 0, 5] = float("nan")  # of an item that is not sampled
    return out


WRONG = {
    "the second scale": (FREE, run_of(FREE, scale_broadcast=16**-0.16), "out"),
    "the first scale": (FREE, run_of(FREE, scale_aggregate=16**-0.51), "out"),
    "no shortcut": (FREE, run_of(FREE, shortcut=0.0), "out"),
    "agents of other cells": (FREE, run_of(FREE, pool=shifted), "out"),
    "agents two percent off": (FREE, run_of(FREE, pool=larger), "out"),
    "no gradient through the agents": (FREE, run_of(FREE, pool=detached), "dq of other rows"),
    "dk of one token": (FREE, spoiled(1), "dk"),
    "dv of one token": (FREE, spoiled(2), "dv"),
    "nan in what is not sampled": (FREE, nan_elsewhere, "out"),
    "the first bias": (TRAINED, run_of(TRAINED, bias_aggregate=lambda t: 0.99 * t), "dbias_aggregate"),
    "the second bias": (TRAINED, run_of(TRAINED, bias_broadcast=lambda t: 0.99 * t), "dbias_broadcast"),
    "a flipped convolution": (TRAINED, run_of(TRAINED, dwc_weight=lambda t: t.flip(-1)), "out"),
    "its bias": (TRAINED, run_of(TRAINED, dwc_bias=lambda t: 0.99 * t), "ddwc_bias"),
}


@pytest.mark.parametrize(("case", "run", "where"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails(case, run, where):
    verdict = prepared(case).oracle.judge(run, gradients=True)
    error, allowed = verdict.errors[where]
    assert not verdict.right and not error <= allowed


def test_a_side_without_a_gradient_is_told():
    with pytest.raises(ValueError, match="no gradient of k"):
        prepared(FREE).oracle.judge(lambda q, k, *rest: run_of(FREE)(q, k.detach(), *rest), gradients=True)


def test_dense_attention_is_timed_with_gradients_of_what_it_has():
    """It takes no agents and no biases."""
    made = prepared(TRAINED)
    dense = next(side for side in made.sides if side.role == "dense").build()
    found = timed_call(dense, made, gradients=True)(lambda: None)
    assert [t is not None for t in found] == [True, True, True, True, False, False, False, False, False]


def test_the_promised_problems_are_there():
    found = {(case.tokens, math.prod(case.to), dim) for case in CASES if not case.trained for dim in case.head_dims}
    for tokens, agents in ((4096, 256), (9216, 576), (16384, 1024), (36864, 1024), (65536, 1024), (65536, 256)):
        assert {(tokens, agents, 64), (tokens, agents, 128)} <= found
    assert {(4096, 256, 40), (9216, 576, 40)} <= found
    assert [case.density for case in CASES if case.name == "agent-4k"] == [pytest.approx(2 * 256 / 4096)]
    assert any(case.trained and case.tokens == 197 and math.prod(case.to) == 49 for case in CASES)


def test_a_shrunk_case_has_rows_that_are_not_sampled_and_cells_that_are_not_even():
    for case in (FREE, TRAINED):
        assert isinstance(case, AgentCase) and case.tokens > prepared(case).oracle.count
        assert any(many % few for many, few in zip(case.grid, case.to, strict=True))
