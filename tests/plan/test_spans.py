"""Span plans against the rule: the plan's own mask, its row intervals as a kernel reads them, its blocks."""

import pytest
import torch

from attn_plugins.plan import spans
from attn_plugins.plan.spans import Place, SpanRule, span_plan


def expected(rule, place, queries, keys):
    i, j = torch.arange(queries) + place.start, torch.arange(keys)
    real = ((i >= place.first) & (i < place.end))[:, None] & (j >= place.first) & (j < place.end)
    return rule.sees(i[:, None] - place.first, j - place.first) & real


@pytest.mark.parametrize("place", [Place(0, 0, 300), Place(120, 0, 300), Place(0, 70, 300), Place(50, 30, 200)])
@pytest.mark.parametrize("grain", [1, 64])
@pytest.mark.parametrize("sink", [0, 5, 64, 100])
@pytest.mark.parametrize("span", [0, 1, 20, 64, 128, 299, 300])
def test_the_plan_is_the_rule(span, sink, grain, place):
    rule = SpanRule.of(span, sink, "token" if grain == 1 else "block")
    queries = 300 - place.start
    plan = span_plan(rule, place, queries, 300)
    exact = expected(rule, place, queries, 300)
    assert torch.equal(plan.to_mask()[0, 0], exact)
    if plan.rule is None:
        return
    seen = plan.rule.intervals(plan).to_mask()
    for row, (start, size) in enumerate(zip(plan.q_start.tolist(), plan.q_size.tolist(), strict=True)):
        rows = slice(start, start + size)
        whole, count = int(plan.full[0, 0, row]), int(plan.count[0, 0, row])
        for slot, block in enumerate(plan.lists[0, 0, row, :count].tolist()):
            keys = slice(int(plan.kv_start[block]), int(plan.kv_start[block] + plan.kv_size[block]))
            if slot < whole:
                assert exact[rows, keys].all()
            else:
                assert torch.equal(seen[rows, keys], exact[rows, keys]) and not exact[rows, keys].all()


def test_an_item_of_padding_only():
    plan = span_plan(SpanRule(4, 0), Place(0, 0, 0), 10, 10)
    assert plan.visited == 0 and not plan.to_mask().any()


def test_plans_are_kept():
    rule, place = SpanRule(128, 64), Place(0, 0, 1000)
    assert span_plan(rule, place, 1000, 1000) is span_plan(SpanRule(128, 64), Place(0, 0, 1000), 1000, 1000)
    assert spans.span_plan.cache_info().maxsize


def test_most_of_a_long_window_needs_no_mask():
    plan = span_plan(SpanRule(2048, 64), Place(0, 0, 8192), 8192, 8192)
    assert int(plan.full.sum()) / int(plan.count.sum()) > 0.85
    assert plan.density < 0.26
