"""Recall and its oracle against brute force over pairs, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from attn_plugins.metrics.recall import attention_rows, row_shares, spread
from tests.support.tolerance import within


@pytest.mark.parametrize(("count", "most"), [(1, 64), (7, 7), (64, 3), (100, 99), (32760, 64), (5, 200)])
def test_spread_takes_one_of_each_stretch(count, most):
    rows = spread(count, most)
    assert len(rows) == min(count, most) and rows.dtype == torch.int64
    stretch = [torch.arange(i * count // len(rows), (i + 1) * count // len(rows)) for i in range(len(rows))]
    assert all(row in one for row, one in zip(rows.tolist(), stretch, strict=True))
    assert torch.equal(rows, spread(count, most))


def test_spread_is_not_in_step_with_the_width_of_a_grid():
    columns = spread(64 * 64, 64) % 64
    assert len(columns.unique()) > 48, "every 64th token would be the same column of a grid 64 wide"


def test_spread_refuses():
    for count, most in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="give 1 or more"):
            spread(count, most)


def problem(dtype=torch.float64, rows=9, keys=23, size=8):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(count, size, generator=rng, dtype=torch.float64).to(dtype) for count in (rows, keys, keys))
    shown = torch.rand(rows, keys, generator=rng) < 0.8
    shown[3] = False  # padding
    return q, k, v, shown


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [None, 0.7])
def test_rows_are_dense_attention(softcap, sink):
    q, k, v, shown = problem()
    k[5] = v[5] = float("nan")  # what stands in padding is not read
    shown[:, 5] = False
    bias = torch.randn(shown.shape, dtype=torch.float64)
    told = None if sink is None else torch.tensor(sink)
    weights, out = attention_rows(q, k, v, shown, 0.3, bias=bias, softcap=softcap, sink=told)
    for row, key in itertools.product(range(len(q)), range(len(k))):
        assert (weights[row, key] > 0) == shown[row, key]
    for row in range(len(q)):
        keys = shown[row].nonzero()[:, 0]
        scores = k[keys] @ q[row] * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = (scores + bias[row, keys]).exp()
        total = scores.sum() + (0 if sink is None else torch.tensor(sink).double().exp())
        torch.testing.assert_close(weights[row, keys], scores / total, atol=1e-12, rtol=0)
        torch.testing.assert_close(
            out[row], scores @ v[keys] / total if len(keys) else 0 * out[row], atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_as_good_as_float32(dtype):
    q, k, v, shown = problem(dtype)
    exact = attention_rows(q.double(), k.double(), v.double(), shown, 0.3)[1]
    theirs = attention_rows(q.float(), k.float(), v.float(), shown, 0.3)[1]
    ours = attention_rows(q, k, v, shown, 0.3)[1]
    assert ours.dtype == torch.float32 and within(ours, theirs, exact)


@pytest.mark.parametrize("seed", range(8))
def test_shares_against_brute_force(seed):
    q, k, v, shown = problem()
    rng = torch.Generator().manual_seed(seed)
    units = int(torch.randint(1, 7, (1,), generator=rng))
    unit_of = torch.randint(-1, units, (len(k),), generator=rng)
    chosen = torch.rand(len(q), units, generator=rng) < 0.5
    weights = attention_rows(q, k, v, shown, 0.3)[0]
    found = row_shares(weights, shown, unit_of, chosen)
    for row in range(len(q)):
        keys = [j for j in range(len(k)) if shown[row, j]]
        if not keys:
            assert found.recall[row].isnan() and found.oracle[row].isnan() and found.shown[row] == 0
            continue
        there = sorted({int(unit_of[j]) for j in keys} - {-1})
        mine = [unit for unit in there if chosen[row, unit]]

        def mass(kept, row=row, keys=keys):
            return sum(float(weights[row, j]) for j in keys if unit_of[j] in (-1, *kept))

        best = max(mass(kept) for kept in itertools.combinations(there, len(mine)))
        assert float(found.recall[row]) == pytest.approx(mass(mine), abs=1e-12)
        assert float(found.oracle[row]) == pytest.approx(best, abs=1e-12)
        assert found.kept[row] == sum(int(unit_of[j]) in (-1, *mine) for j in keys) and found.shown[row] == len(keys)


def test_block_diagonal_with_known_weights():
    """Two blocks of two keys; a row's weights are 1/2, 1/4, 1/8, 1/8: it keeps 3/4, or 1/4 from the other side."""
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]]).log()
    shown = torch.ones(2, 4, dtype=torch.bool)
    weights = attention_rows(scores, torch.eye(4), torch.eye(4), shown, 1.0)[0]
    found = row_shares(weights, shown, torch.tensor([0, 0, 1, 1]), torch.eye(2, dtype=torch.bool))
    assert found.recall.tolist() == pytest.approx([0.75, 0.25])
    assert found.oracle.tolist() == pytest.approx([0.75, 0.75])
    single = row_shares(weights, shown, torch.arange(4), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool())
    assert single.recall.tolist() == pytest.approx([0.625, 0.375])
    assert single.oracle.tolist() == pytest.approx([0.75, 0.75]), "of single keys the best two"


def test_everything_kept_is_exactly_one():
    q, k, v, shown = problem(torch.float32)
    shown[3] = True
    weights = attention_rows(q, k, v, shown, 0.3, sink=torch.tensor(1.0))[0]
    found = row_shares(weights, shown, torch.arange(23) % 5, torch.ones(9, 5, dtype=torch.bool))
    assert (found.recall == 1).all() and torch.equal(found.kept, found.shown)
    torch.testing.assert_close(found.oracle, torch.ones(9, dtype=torch.float64), atol=1e-12, rtol=0)
