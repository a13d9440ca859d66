"""KL and agreement against their definitions, and intervals against theirs."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from attn_plugins.metrics import Interval, kl_divergence, mean_interval, top1_agreement
from attn_plugins.metrics.divergence import CHUNK


def test_kl_is_the_sum_over_the_classes():
    dense, patched = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    found = kl_divergence(dense, patched)
    for b in range(2):
        for n in range(3):
            p, q = (t[b, n].exp() / t[b, n].exp().sum() for t in (dense, patched))
            expected = sum(float(p[c]) * math.log(float(p[c]) / float(q[c])) for c in range(7))
            assert float(found[b, n]) == pytest.approx(expected, rel=1e-10)
    assert not torch.allclose(found, kl_divergence(patched, dense)), "it is of dense from patched, not the other way"


def test_kl_over_more_rows_than_a_chunk_and_in_half_precision():
    dense = torch.randn(CHUNK + 3, 5)
    patched = dense + 0.3 * torch.randn(CHUNK + 3, 5)
    found = kl_divergence(dense, patched)
    assert found.shape == (CHUNK + 3,) and found.dtype == torch.float64 and (found > 0).all()
    assert float(found[-1]) == pytest.approx(float(kl_divergence(dense[-1], patched[-1])))
    half = kl_divergence(dense.bfloat16(), patched.bfloat16())
    assert torch.equal(half, kl_divergence(dense.bfloat16().double(), patched.bfloat16().double()))


def test_equal_predictions_have_no_distance():
    logits = torch.randn(4, 9)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(4, dtype=torch.float64))
    assert kl_divergence(logits.double(), logits.double() + 3).abs().max() < 1e-12
    assert kl_divergence(torch.zeros(0, 9), torch.zeros(0, 9)).shape == (0,)


def test_classes_that_are_ruled_out():
    never = torch.tensor([0.0, 0.0, -math.inf])
    assert float(kl_divergence(never, torch.zeros(3))) == pytest.approx(math.log(3) - math.log(2), rel=1e-6)
    assert float(kl_divergence(torch.zeros(3), never)) == math.inf


def test_agreement_is_of_the_first_choice():
    dense = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    assert top1_agreement(dense, dense * torch.tensor([[1.0], [1.0], [-1.0]])).tolist() == [True, True, False]


@pytest.mark.parametrize("measure", [kl_divergence, top1_agreement])
def test_refusals(measure):
    with pytest.raises(ValueError, match="two equal"):
        measure(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="float logits"):
        measure(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))


def test_intervals():
    values = [1.0, 2.0, 4.0, 5.0]
    half = 1.96 * statistics.stdev(values) / 2
    found = mean_interval(values)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert found.through(math.exp).high == pytest.approx(math.exp(3 + half))
    assert found.within(0, 3.5) == Interval(3.0, found.low, 3.5)
    alone = mean_interval([2.0])
    assert alone.mean == 2 and math.isnan(alone.low) and math.isnan(alone.within(0, 1).high)
    assert math.isnan(mean_interval([1.0, math.inf]).low)
    with pytest.raises(ValueError, match="no samples"):
        mean_interval([])
