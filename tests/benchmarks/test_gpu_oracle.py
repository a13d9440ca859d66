"""The check before the stopwatch: passes what is right, and sees every kind of wrong."""

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.pipelines.benching.definitions.window_rule import WindowRule
from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.sides import Verdict
from tests.support.spoiled import Spoiled

RULE = WindowRule((300,), (40,), (1,), 5)


def leaves(dtype=torch.float32, heads=6, kv_heads=3):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, RULE.length, 16, generator=rng).to(dtype) for h in (heads, kv_heads, kv_heads))


def attention(rule):
    every = torch.arange(rule.length)
    mask = rule.seen(every[:, None], every[None])

    def run(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_right_passes(dtype, gradients):
    verdict = SampledAttention(leaves(dtype), RULE.mask_rows).judge(attention(RULE), gradients)
    assert verdict.right and set(verdict.errors) == {"out", *(("dq", "dk", "dv") if gradients else ())}


def test_both_ends_are_among_the_rows():
    rows = SampledAttention(leaves(), RULE.mask_rows).rows
    assert len(rows.unique()) == 128 and {0, RULE.length - 1} <= set(rows.tolist())
    assert torch.equal(rows, SampledAttention(leaves(), RULE.mask_rows).rows)


def wrong_mask(q, k, v):
    return attention(WindowRule((300,), (41,), (1,), 5))(q, k, v)


def wrong_text(q, k, v):
    return attention(WindowRule((305,), (40,), (1,)))(q, k, v)


def nan_outside(q, k, v):
    out = attention(RULE)(q, k, v).clone()
    out[0, 1, 5] = float("nan")  # another item, another head: never sampled
    return out


def wrong_gradient_of(which):
    def run(*tensors):
        tensors = [Spoiled.apply(t) if i == which else t for i, t in enumerate(tensors)]
        return attention(RULE)(*tensors)

    return run


WRONG = {
    "a window one too wide": (wrong_mask, "out"),
    "text as grid": (wrong_text, "out"),
    "nan in what is not sampled": (nan_outside, "out"),
    "2 % off": (lambda *t: attention(RULE)(*t) * 1.02, "out"),
    "dk of one key": (wrong_gradient_of(1), "dk"),
    "dv of one key": (wrong_gradient_of(2), "dv"),
}


@pytest.mark.parametrize(("run", "where"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails(run, where):
    verdict = SampledAttention(leaves(), RULE.mask_rows).judge(run, gradients=True)
    error, allowed = verdict.errors[where]
    assert not verdict.right and not error <= allowed
    _, error, allowed = verdict.worst
    assert not error <= allowed


def test_a_gradient_that_is_not_sampled_is_not_seen_and_one_that_is_is():
    oracle = SampledAttention(leaves(), RULE.mask_rows)
    row = oracle.rows[40].item()

    class Spoil(Spoiled):
        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[-1, -1, row] += 0.1
            return grad

    run = lambda q, k, v: attention(RULE)(Spoil.apply(q), k, v)  # noqa: E731
    assert not oracle.judge(run, gradients=True).right


def test_a_verdict_on_nan_is_wrong():
    verdict = Verdict({"out": (0.1, 0.2), "dq": (float("nan"), 0.2)})
    assert not verdict.right and verdict.worst[0] == "dq"
