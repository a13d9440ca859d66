"""Which steps stay dense: the first, the last, or both."""

import pytest

from attn_plugins.schedule import Schedule, describe


def sparse(dense_steps, total, **more):
    schedule = Schedule(dense_steps, **more)
    found = [step for step in range(total) if not schedule.is_dense(step, None if more else total)]
    assert found == list(schedule.sparse_steps(total))
    return found


@pytest.mark.parametrize(
    ("dense_steps", "expected"),
    [
        (0, range(10)),
        (3, range(3, 10)),
        (0.25, range(2, 10)),
        ((0, 0.6), range(4)),
        ((0.2, 0.3), range(2, 7)),
        ((1, 2), range(1, 8)),
        ([0.0, 4], range(6)),
        ((0.7, 0.7), range(0)),
        (1.0, range(0)),
    ],
)
def test_first_and_last(dense_steps, expected):
    assert sparse(dense_steps, 10) == list(expected)
    assert sparse(dense_steps, 10, num_steps=10) == list(expected)


def test_a_pair_without_an_end_is_the_plain_number():
    assert Schedule((0.3, 0)) == Schedule(0.3) and Schedule([0, 0]).always_sparse
    assert Schedule((0, 0.6)).dense_steps == (0, 0.6) and not Schedule((0, 0.6)).always_sparse


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "share"),
    [(0, None, 0), (0.3, None, 0.3), (5, None, None), (5, 20, 0.25), ((0, 0.6), None, 0.6), ((5, 0.5), 20, 0.75)],
)
def test_share(dense_steps, num_steps, share):
    assert Schedule(dense_steps, num_steps).dense_share == share


def test_words():
    assert describe(Schedule(0.3)) == "the first 30% of the steps"
    assert describe(Schedule((2, 0.5))) == "the first 2 steps and the last 50% of the steps"


@pytest.mark.parametrize("dense_steps", [-1, 1.5, True, (0.1, 0.2, 0.3), (0, -1), "0.3", None])
def test_what_is_no_number_of_steps(dense_steps):
    with pytest.raises(ValueError, match="dense_steps="):
        Schedule(dense_steps)


@pytest.mark.parametrize("dense_steps", [0.3, (0, 5), (2, 0.5)])
def test_an_unknown_length_is_said(dense_steps):
    with pytest.raises(ValueError, match="whose length is unknown"):
        Schedule(dense_steps).is_dense(0, None)
