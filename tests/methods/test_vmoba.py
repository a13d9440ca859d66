"""VMoBA as a method: its recurrence over layers, its blocks on the grid at hand, and what it computes."""

import pytest
import torch
import yaml

from attn_plugins import presets
from attn_plugins.method import AttentionCall
from attn_plugins.methods.vmoba import VMoBA, VMoBAConfig
from attn_plugins.ops import vmoba_attention
from attn_plugins.sequence import Sequence


def call(sequence, batch=2, **options):
    q, k, v = (torch.randn(batch, heads, sequence.length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return AttentionCall(q, k, v, kind="self", sequence=sequence, **options)


def test_layers_take_the_dimensions_in_turn_and_share_processors():
    method, config = VMoBA(), VMoBAConfig()
    found = [method.processor(config, layer, 8) for layer in range(8)]
    assert [one.config.recurrence for one in found] == [((1,), (2,), (3,))[layer % 3] for layer in range(8)]
    assert all(one is found[layer % 3] for layer, one in enumerate(found))
    alone = VMoBAConfig(recurrence=(3,))
    assert method.processor(alone, 0, 8) is method.processor(alone, 5, 8)


def test_published_blocks_and_numbers():
    """Numbers of blocks of the paper's table, from the presets."""
    for name, counts, numbers in (
        ("wan_1_3b_480p", (7, 24, 72), (2, 6, 18)),
        ("wan_1_3b_720p", (7, 40, 36), (2, 10, 9)),
        ("wan_1_3b_train", (8, 48, 72), None),
    ):
        row = next(row for row in presets.available("vmoba") if row.name == name)
        config = VMoBAConfig.from_options(**row.at("balanced").options)
        for dimension in (1, 2, 3):
            block = config.block(row.base_size, dimension)
            count = 1
            for length, size in zip(row.base_size, block, strict=True):
                count *= -(-length // size)
            assert count == counts[dimension - 1]
            if numbers:
                setting = VMoBA().processor(config, dimension - 1, 30).setting(row.base_size)
                assert setting["k_blocks"] == numbers[dimension - 1]
    training = next(row for row in presets.available("vmoba") if row.name == "wan_1_3b_train").at("balanced").options
    assert (training["rule"], training["scope"], training["tau"]) == ("threshold", "head", 0.25)


@pytest.mark.parametrize("row", presets.available("vmoba"), ids=lambda row: row.name)
def test_presets_hold_on_their_grid_and_on_others(row):
    shares = []
    for quality in presets.QUALITIES:
        config = VMoBAConfig.from_options(**row.at(quality).options)
        layers = [VMoBA().processor(config, layer, 3) for layer in range(3)]
        shares.append(sum(layer.density(Sequence(row.base_size)) for layer in layers) / 3)
        for grid in ((1, 8, 8), (5, 7, 3), tuple(2 * size for size in row.base_size)):
            assert all(0 < layer.density(Sequence(grid)) <= 1 for layer in layers)
    assert 0.5 > shares[0] > shares[2] and shares[0] >= shares[1] >= shares[2]
    assert row.at("safe").dense_steps >= row.at("fast").dense_steps


def test_blocks_scale_with_the_grid_and_pictures_have_no_time():
    config = VMoBAConfig(blocks=((3, -1, -1), (-1, 5, 13), (7, 5, 13)), base_size=(21, 30, 52))
    assert config.block((21, 30, 52), 3) == (7, 5, 13)
    assert config.block((42, 60, 26), 3) == (14, 10, 6)
    assert config.block((1, 30, 52), 1) == config.block((1, 30, 52), 2) == (1, 5, 13)
    assert config.block((30, 52), 1) == (5, 13) and config.block((21,), 2) == (3,)
    assert VMoBAConfig().block((16, 20, 40), 2) == (16, 4, 10)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("exact", [False, True])
def test_it_calls_the_operator_with_what_it_was_told(layer, exact):
    sequence = Sequence((4, 6, 6), 3, 5, (3, 1), 2)
    config = VMoBAConfig(
        blocks=((1, -1, -1), (-1, 2, 3), (2, 3, 3)), k_blocks=(2, 3, 1), exact=exact, tile=4, max_blocks=2
    )
    one = call(sequence, scale=0.4)
    block, number = [((1, 6, 6), 2), ((4, 2, 3), 3), ((2, 3, 3), 1)][layer]
    want = vmoba_attention(
        one.q, one.k, one.v, grid=(4, 6, 6), block=block, k_blocks=number, exact=exact, tile=4, max_blocks=2,
        text_before=[[3, 3], [3, 1]], text_after=[[5, 2], [5, 2]], scale=0.4, backend="reference",
    )  # fmt: skip
    found = VMoBA().processor(config, layer, 3)(one)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_density_of_topk_is_the_masks():
    config = VMoBAConfig(blocks=((2, -1, -1), (-1, 3, 3), (2, 3, 3)), k_blocks=2, backend="reference")
    sequence = Sequence((4, 6, 6), 0, 5)
    for layer, blocks in enumerate((2, 4, 8)):
        expected = (144 * (144 * 2 / blocks + 10) + 25) / 149**2
        assert VMoBA().processor(config, layer, 3).density(sequence) == pytest.approx(expected)


def test_what_it_refuses():
    processor = VMoBA().processor(VMoBAConfig(), 0, 3)
    assert processor.refuses(call(Sequence((2, 4, 4)))) is None
    for options in ({"causal": True}, {"dropout": 0.1}, {"mask": torch.ones(1, 1, 32, 32, dtype=torch.bool)}):
        assert processor.refuses(call(Sequence((2, 4, 4)), **options))


@pytest.mark.parametrize(
    "config",
    [
        VMoBAConfig(),
        VMoBAConfig(blocks=((3, -1, -1), (-1, 5, 13), (7, 5, 13)), k_blocks=(2, 6, 18), base_size=(21, 30, 52)),
        VMoBAConfig(rule="threshold", scope="head", tau=0.3, max_blocks=4, exact=True, tile=64, recurrence=(3, 1)),
    ],
    ids=["default", "published", "threshold"],
)
def test_options_round_trip_through_yaml(config):
    again = VMoBAConfig.from_options(**yaml.safe_load(yaml.safe_dump(config.to_options())))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"blocks": [[1, 1, 1]]}, "blocks="),
        ({"blocks": [[1, 1, 1], [1, 1, 1], [1, 1, 0]]}, "blocks: 0"),
        ({"recurrence": [1, 4]}, "recurrence="),
        ({"k_blocks": [1, 2]}, "k_blocks="),
        ({"k_blocks": 1.5}, "k_blocks=1.5"),
        ({"rule": "best"}, "rule='best'"),
        ({"tau": -1}, "tau=-1"),
        ({"tile": 0}, "tile=0"),
        ({"min_blocks": 3, "max_blocks": 1}, "max_blocks=1"),
        ({"base_size": [21, 30]}, "base_size="),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        VMoBAConfig.from_options(**options)
