"""Where caches of different lengths stand: every token once, nothing between, and nothing copied to be read."""

import itertools
import random

import pytest
import torch

from attn_plugins.ops import decode_attention
from attn_plugins.ops.decode import cpu, layout, tiling
from attn_plugins.ops.decode.layout import Layout
from attn_plugins.ops.decode.rings import Rings
from tests.support.tolerance import sdpa, within

RAGGED = [2048, 512, 1088, 448, 64, 3200, 576]  # whole blocks of 64


def drawn(seed):
    dice = random.Random(seed)
    lengths = [dice.choice([0, 3, 4, 8, 9, 17, 40]) for _ in range(dice.randint(1, 6))]
    return lengths if seed % 4 else lengths[:1] * len(lengths)


@pytest.fixture
def short_tiles(monkeypatch):
    monkeypatch.setattr(layout, "LONG", 4)


@pytest.mark.parametrize("seed", range(12))
def test_every_place_has_a_slot_of_its_own(seed, short_tiles):
    lengths = drawn(seed)
    made = Layout.of(lengths)
    slots = [[made.slot(head, n) for n in range(length)] for head, length in enumerate(lengths)]
    assert sorted(itertools.chain(*slots)) == list(range(made.total)) == list(range(sum(lengths)))
    for most in (None, 0, 1, 4, 6, 100):
        for row, held in zip(made.ranges(most), slots, strict=True):
            assert list(itertools.chain(*(range(*pair) for pair in row))) == held[:most]


def test_whole_tiles_come_first_and_begin_where_tiles_do():
    made = Layout.of(RAGGED)
    assert made.parted
    assert all(start % layout.LONG == 0 for start in made.starts) and min(made.rests) == sum(made.mains)
    assert all(length - main < layout.LONG for length, main in zip(made.lengths, made.mains, strict=True))


@pytest.mark.parametrize("lengths", [[700, 700, 700], [511, 64, 5], [5000], [0, 0]], ids=str)
def test_what_gains_nothing_stays_in_one_piece(lengths):
    made = Layout.of(lengths)
    assert not made.parted and made.starts == tuple(itertools.accumulate([0, *lengths[:-1]]))


@pytest.mark.parametrize("rows", [1, 4])
def test_caches_of_whole_blocks_are_read_without_a_copy(rows):
    """Each token is in one tile of its own head: of 512 and behind them of 64, or of 64, which is cheap for one row."""
    made = Layout.of(RAGGED)
    _, _, found = cpu._plan_of(
        tuple(torch.tensor(made.ranges()).flatten().tolist()), (1, len(RAGGED), 2, 2), 1, made.total, 128, 4, rows, 2,
        torch.device("cpu"),
    )  # fmt: skip
    two = [(0, 512), (sum(made.mains), 64)]
    assert [(view.first, view.tile) for view in found.views] == (two if rows > 1 else [(0, 64)])
    assert found.ends is None and found.nobodys is None
    tokens = torch.cat([torch.full((view.count,), view.tile) for view in found.views])
    assert torch.zeros(len(RAGGED), dtype=torch.int64).index_add_(0, found.owner[0], tokens).tolist() == RAGGED


def test_the_cheapest_cut_is_chosen():
    """Whatever is chosen costs no more, by the model, than any other: also where heads stand one behind another."""
    ends = list(itertools.accumulate([0, *RAGGED]))
    packed = (tuple((head, a, b) for head, (a, b) in enumerate(itertools.pairwise(ends))),)
    assert tiling.tiling_of(packed, len(RAGGED), 1024, 8192, 0, torch.device("cpu")) is None
    found = tiling.tiling_of(packed, len(RAGGED), 1024, 8192, 1 << 60, torch.device("cpu"))
    costs = {tile: tiling._cut(packed, (tile,)).cost(1, 1024, 8192) for tile in tiling.TILES}
    assert found.views[0].tile == min(costs, key=costs.get)


def test_a_device_is_told_the_same_ranges(short_tiles):
    """What the host makes of a list, a GPU makes of its own tensors."""
    rings = Rings([3, 8, 21], 2, *(torch.zeros(1, 3, 1, 8) for _ in range(2)))
    for places in (1, 4, 5, 9, 30):
        assert torch.equal(rings._held(places), rings._first(places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parted_rings_see_what_they_keep_and_nothing_else(dtype):
    """Full to the last slot, then wrapped; the slot of what nobody keeps holds NaN."""
    sink, full, more = 64, max(RAGGED), 100
    q, k, v = (torch.randn(2, len(RAGGED), full + more, 16).to(dtype) for _ in range(3))
    rings = Rings([length - sink for length in RAGGED], sink, k, v)
    assert rings.layout.parted and rings.nbytes == 2 * 2 * (sum(RAGGED) + 1) * 16 * k.element_size()
    rings.keys.fill_(float("nan"))
    rings.values.fill_(float("nan"))
    done = 0
    for n in (full, full + more):
        rings.write(k[:, :, done:n], v[:, :, done:n], done)
        rings.keys[:, rings.total] = rings.values[:, rings.total] = float("nan")
        done, j = n, torch.arange(n)
        kept = torch.stack([(j < sink) | (n - 1 - j < length - sink) for length in RAGGED])[None, :, None]
        parts = q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]
        found, _ = rings.attend(parts[0], n - 1, n, None, "cpu")
        assert within(found, sdpa(*parts, kept, None), sdpa(*(t.double() for t in parts), kept, None))


def test_ranges_between_nan_are_read_alone():
    made = Layout.of(RAGGED)
    k = torch.full((1, made.total + 200, 16), float("nan"))
    k[:, 100 : 100 + made.total] = torch.randn(made.total, 16)
    ranges = torch.tensor(made.ranges())[None] + 100
    assert bool(decode_attention(torch.randn(1, 14, 1, 16), k, k, ranges=ranges).isfinite().all())
