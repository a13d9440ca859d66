"""Rules: the published grid, and what a rule reaches."""

from __future__ import annotations

import pytest

from attn_plugins.search import Rule, rule_grid


def test_the_published_lengths_give_the_published_number_of_rules():
    rules = rule_grid(2048, 8192)
    assert len(rules) == len(set(rules)) == 48
    assert {rule.alpha % 1024 for rule in rules} == {0} and {rule.beta * 8 % 1 for rule in rules} == {0.0}


def test_the_grid_is_exactly_the_rules_that_make_sense():
    step, parts = 256, 4
    rules = rule_grid(512, 2048, step=step, parts=parts)
    every = {(a * step, b / parts) for a in range(-2, 9) for b in range(parts + 1)}
    sense = {(a, b) for a, b in every if a + b * 512 > 0 and all(a + b * n <= n for n in (2048, 4096, 65536))}
    assert set(rules) == sense and rules == sorted(rules)


def test_a_scaled_model_has_the_same_grid():
    small, large = rule_grid(1024, 4096), rule_grid(2048, 8192)
    assert [(2 * rule.alpha, rule.beta) for rule in small] == large


@pytest.mark.parametrize(
    ("rule", "length", "span"),
    [
        (Rule(0, 0.5), 1000, 500),
        (Rule(-256, 0.25), 512, 0),
        (Rule(-256, 0.25), 2048, 256),
        (Rule(1024, 0.0), 512, 512),
        (Rule(0, 0.125), 1001, 125),
    ],
)
def test_the_span_of_a_rule(rule, length, span):
    assert rule.span(length) == span


@pytest.mark.parametrize("bad", [(0, 8), (8, 4)])
def test_lengths_out_of_order_are_named(bad):
    with pytest.raises(ValueError, match=f"shortest={bad[0]}, longest={bad[1]}"):
        rule_grid(*bad)


def test_no_step_of_nothing():
    with pytest.raises(ValueError, match="step=0"):
        rule_grid(8, 16, step=0)
