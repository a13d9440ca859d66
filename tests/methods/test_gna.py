"""GNA as a method: its config, its constructors, its processors, and what they compute."""

import dataclasses
import itertools

import pytest
import torch
import yaml

from attn_plugins.method import AttentionCall
from attn_plugins.methods.gna import GNA, GNAConfig, GNAProcessor
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.sequence import Sequence
from tests.support.rule import rule_mask


def call(sequence, batch=2, heads=4, kv_heads=2, **options):
    shapes = ((batch, heads), (batch, kv_heads), (batch, kv_heads))
    tensors = [torch.randn(*shape, sequence.length, 8, dtype=torch.float64) for shape in shapes]
    return AttentionCall(*tensors, kind="self", sequence=sequence, **options)


def masked(one, mask, scale=8**-0.5):
    return masked_attention(one.q, one.k, one.v, mask, scale)[0]


def check(config, grid, mask):
    one = call(Sequence(grid))
    torch.testing.assert_close(GNAProcessor(config)(one), masked(one, mask), rtol=0, atol=1e-12)


def pairs(grid, sees):
    """A mask from a function of two cells."""
    cells = list(itertools.product(*map(range, grid)))
    return torch.tensor([[sees(query, key) for key in cells] for query in cells])


# Constructors, each against its own paper's words.


def test_neighborhood_is_the_nearest_keys():
    def sees(query, key):
        centre = [min(max(x, 1), size - 2) for x, size in zip(query, (6, 7), strict=True)]
        return all(abs(x - y) <= 1 for x, y in zip(centre, key, strict=True))

    check(GNAConfig.neighborhood(3), (6, 7), pairs((6, 7), sees))


def test_dilated_neighborhood_is_the_nearest_keys_of_a_class():
    def sees(query, key):
        for x, y in zip(query, key, strict=True):
            centre = min(max(x // 2, 1), 2)  # four of each class
            if x % 2 != y % 2 or abs(centre - y // 2) > 1:
                return False
        return True

    check(GNAConfig.neighborhood(3, dilation=2), (8, 8), pairs((8, 8), sees))


def test_blocked_is_the_same_block():
    check(
        GNAConfig.blocked((2, 4)), (4, 8), pairs((4, 8), lambda q, k: (q[0] // 2, q[1] // 4) == (k[0] // 2, k[1] // 4))
    )


def test_halo_is_the_block_and_what_is_around_it():
    mask = pairs((24,), lambda q, k: q[0] // 4 * 4 - 2 <= k[0] < q[0] // 4 * 4 + 6)
    one = call(Sequence((24,)))
    interior = slice(4, 20)
    found, expected = GNAProcessor(GNAConfig.halo(4, 2))(one), masked(one, mask)
    torch.testing.assert_close(found[:, :, interior], expected[:, :, interior], rtol=0, atol=1e-12)
    assert not torch.allclose(found, expected)  # at the borders HaloNet pads, this shifts


def test_grid_attention_is_an_even_grid():
    mask = pairs((12, 12), lambda q, k: (q[0] - k[0]) % 3 == 0 and (q[1] - k[1]) % 3 == 0)
    check(GNAConfig.grid_attention(4, 12), (12, 12), mask)


def test_sliding_tile_is_tiles_around_a_tile():
    def sees(query, key):
        for x, y, tile, tiles, count in zip(query, key, (2, 3), (3, 1), (5, 3), strict=True):
            centre = min(max(x // tile, tiles // 2), count - 1 - tiles // 2)
            if abs(centre - y // tile) > tiles // 2:
                return False
        return True

    check(GNAConfig.sliding_tile((2, 3), (3, 1)), (10, 9), pairs((10, 9), sees))


# What a processor computes.


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_joint_sequence_with_padding(backend):
    sequence = Sequence((4, 6), 3, 5, (3, 1), (5, 4))
    one = call(sequence, scale=0.4)
    found = GNAProcessor(GNAConfig(window=(3, 4), stride=(1, 2), backend=backend))(one)
    for b in range(2):
        mask = rule_mask((4, 6), (3, 4), (1, 2), (1, 1), (False, False), (3, (3, 1)[b]), (5, (5, 4)[b]))
        expected = masked_attention(one.q[b, None], one.k[b, None], one.v[b, None], mask, 0.4)[0]
        torch.testing.assert_close(found[b, None], expected, rtol=0, atol=1e-12)


def test_padding_that_is_alike_in_all_items():
    sequence = Sequence((4, 4), 6, 0, 2)
    one = call(sequence)
    mask = rule_mask((4, 4), (3, 3), (1, 1), (1, 1), (False, False), (6, 2))
    torch.testing.assert_close(GNAProcessor(GNAConfig(window=3, stride=1))(one), masked(one, mask), rtol=0, atol=1e-12)


def test_heads_with_settings_of_their_own():
    config = GNAConfig(
        window=3, stride=1, per_head=[{"heads": [1, 3], "window": [5, 5]}, {"heads": [2], "causal": True}]
    )
    rows = [((3, 3), (False, False)), ((5, 5), (False, False)), ((3, 3), (True, True)), ((5, 5), (False, False))]
    mask = torch.stack([rule_mask((6, 6), window, (1, 1), (1, 1), causal) for window, causal in rows])
    check(config, (6, 6), mask)
    with pytest.raises(ValueError, match="head 3, but the layer has 2"):
        config.fit((6, 6), 2)


def test_what_it_refuses():
    processor, sequence = GNAProcessor(GNAConfig(window=3)), Sequence((4, 4))
    assert processor.refuses(call(sequence)) is None
    one = call(sequence)
    assert "16 keys for 15 queries" in (processor.refuses(dataclasses.replace(one, q=one.q[:, :, 1:])) or "")
    assert processor.refuses(call(sequence, causal=True))
    assert processor.refuses(call(sequence, dropout=0.1))
    assert processor.refuses(call(sequence, mask=torch.ones(1, 1, 16, 16, dtype=torch.bool)))


@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize(
    "config",
    [
        GNAConfig(window=(3, 8, 8), stride=(1, 4, 4)),
        GNAConfig.blocked((2, 4, 4)),
        GNAConfig.neighborhood(3),
        GNAConfig(window=-1),
        GNAConfig(window=3, stride=1, per_head=[{"heads": [1], "window": -1}]),
    ],
)
def test_density_is_the_plans(config, text):
    sequence = Sequence((4, 12, 16), 0, text)
    processor = GNAProcessor(config)
    heads = 2 if config.per_head else 1
    plans = [processor.plan(sequence, head, heads) for head in range(heads)]
    assert processor.density(sequence) == pytest.approx(sum(plan.density for plan in plans) / heads)
    for head, plan in enumerate(plans):
        one = config.fit(sequence.grid, heads)[head if heads > 1 else 0]
        mask = rule_mask(sequence.grid, one.window, one.stride, one.dilation, one.causal, (0, 0), (text, text))
        assert torch.equal(plan.to_mask()[0, 0], mask)


def test_density_counts_real_text_only():
    padded, processor = Sequence((8, 8), 0, 64, 0, (4, 60)), GNAProcessor(GNAConfig(window=3, stride=1))
    plans = [processor.plan(padded.item(item)) for item in range(2)]
    assert plans[0].density < 0.2 < plans[1].density
    assert processor.density(padded) == pytest.approx((plans[0].density + plans[1].density) / 2)


# Layers and options.


def test_layers_with_settings_of_their_own_and_one_processor_for_equal_ones():
    options = {
        "window": 4,
        "stride": 2,
        "per_layer": [{"layers": [0, 2], "window": 3, "stride": 1}, {"layers": [4], "causal": True}],
    }
    config = GNAConfig.from_options(**options)
    method = GNA()
    processors = [method.processor(config, index, 6) for index in range(6)]
    fitted = [processor.config.fit((8, 8), 1)[0] for processor in processors]
    assert [one.window[0] for one in fitted] == [3, 4, 3, 4, 4, 4]
    assert [one.causal[0] for one in fitted] == [False] * 4 + [True, False]
    assert processors[0] is processors[2] and processors[1] is processors[3] is processors[5]
    assert len({id(processor) for processor in processors}) == 3
    again = [method.processor(GNAConfig.from_options(**options), index, 6) for index in range(6)]
    assert all(one is other for one, other in zip(processors, again, strict=True))


CONFIGS = [
    GNAConfig(),
    GNAConfig(window=(18, 24, 24), stride=(16, 8, 8), base_size=(30, 48, 80)),
    GNAConfig(window=0.25, stride="auto", dilation=(1, 2), causal=(True, False), small_grid="error", backend="cpu"),
    GNAConfig(per_layer=[{"layers": [0, 1], "window": [4, 16], "dilation": [11, 5]}, {"layers": [3], "causal": True}]),
    GNAConfig(window=-1, stride=1, per_head=[{"heads": [0], "window": (3, 5)}, {"heads": [2, 3], "stride": 1}]),
    GNAConfig.sliding_tile((6, 8, 8), (3, 3, 3)),
    GNAConfig.halo(8, 2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_options_round_trip_through_yaml(config):
    text = yaml.safe_dump(config.to_options())
    again = GNAConfig.from_options(**yaml.safe_load(text))
    assert again == config and hash(again) == hash(config)
    assert yaml.safe_dump(again.to_options()) == text


def test_the_default_is_written_as_nothing():
    assert GNAConfig().to_options() == {}
    assert GNAConfig(window=0.5).to_options() == {"window": 0.5}


def test_the_default_is_half_of_every_axis():
    assert GNAConfig().fit((8, 12), 4)[0].window == (4, 6)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"windw": 3}, TypeError, "'windw' .did you mean 'window'"),
        ({"tau": 1}, TypeError, "GNAConfig takes window, stride"),
        ({"window": 4, "stride": 5}, ValueError, "stride=5 is larger than window=4"),
        ({"small_grid": "grow"}, ValueError, 'small_grid=\'grow\': legal are "shrink" and "error"'),
        ({"per_layer": [{"window": 3}]}, ValueError, "per_layer: a row has 'layers'"),
        ({"per_layer": [{"layers": [0], "windows": 3}]}, ValueError, "per_layer: a row has 'layers' and any of window"),
        ({"per_head": [{"layers": [0]}]}, ValueError, "per_head: a row has 'heads'"),
        ({"per_layer": [{"layers": [0], "window": 2, "stride": 3}]}, ValueError, "stride=3 is larger than window=2"),
        ({"per_layer": [{"layers": [0], "window": 0}]}, ValueError, "window=0"),
        ({"per_layer": [{"layers": 0, "window": 3}]}, ValueError, "per_layer: 'layers' is a list"),
    ],
)
def test_bad_options_are_named(options, error, named):
    with pytest.raises(error, match=named):
        GNAConfig.from_options(**options)
