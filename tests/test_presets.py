"""Presets are data: every file is held to what it claims, and the choice of a file to its rules."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from attn_plugins import presets, registry
from attn_plugins.methods.gna import GNAConfig
from attn_plugins.plan.simulator import simulate
from attn_plugins.plan.windows import AxisWindow, axis_windows

FILES = presets.load()
GNA = [row for row in FILES if row.method == "gna"]
CASES = [pytest.param(row, quality, id=f"{row.name}-{quality}") for row in GNA for quality in presets.QUALITIES]
PATTERNS = ("window", "stride", "dilation", "causal")

GOOD = """
title: a model
method: gna
families: [wan]
evidence: derived
source: nowhere
qualities:
  safe: {window: 3, dense_steps: 3/10}
  balanced: {window: 2, dense_steps: 0.25}
  fast: {window: 1, dense_steps: 0}
"""


def settings(row: presets.PresetFile, quality: str) -> list[tuple[tuple[AxisWindow, ...], int]]:
    """(the windows on the base grid, how many layers have them)."""
    options = row.at(quality).options
    rules = options.get("per_layer") or [options]
    return [
        (
            axis_windows(row.base_size, **{key: rule[key] for key in PATTERNS if key in rule}),
            len(rule.get("layers", [0])),
        )
        for rule in rules
    ]


def density(row: presets.PresetFile, quality: str) -> float:
    """Share of the keys that a query sees, averaged over the layers."""
    rows = settings(row, quality)
    pairs = sum(count * math.prod(axis.window for axis in axes) for axes, count in rows)
    return pairs / sum(count for _, count in rows) / math.prod(row.base_size)


def model(**config) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**config))


WAN_SMALL = model(num_layers=30, num_attention_heads=12)
WAN_LARGE = model(num_layers=40, num_attention_heads=40)
DIGITS = model(num_layers=6, num_attention_heads=2)


@pytest.mark.parametrize("row, quality", CASES)
def test_settings_are_legal_options(row, quality):
    preset = row.at(quality)
    assert settings(row, quality)  # axis_windows has raised otherwise
    config = GNAConfig.from_options(**preset.options)
    assert {field.name for field in dataclasses.fields(config)} >= set(preset.options)
    assert 0 < density(row, quality) < 0.7


@pytest.mark.parametrize("row, quality", CASES)
def test_settings_fit_their_grid_as_written_and_other_grids_scaled(row, quality):
    config = GNAConfig.from_options(**row.at(quality).options)
    other_grids = [tuple(max(size * share // 4, 1) for size in row.base_size) for share in (1, 2, 3, 6)]
    other_grids.append((1, *row.base_size[1:]))
    for layer in range(28):
        (fitted,) = config.for_layer(layer).fit(row.base_size, heads=1)
        written = [axes for axes, _ in settings(row, quality)]
        assert axis_windows(row.base_size, fitted.window, fitted.stride, fitted.dilation, fitted.causal) in written
        for grid in other_grids:
            (scaled,) = config.for_layer(layer).fit(grid, heads=1)
            axis_windows(grid, scaled.window, scaled.stride, scaled.dilation, scaled.causal)  # raises if illegal


@pytest.mark.parametrize("row", GNA, ids=lambda row: row.name)
def test_qualities_are_in_order(row):
    safe, balanced, fast = (density(row, quality) for quality in presets.QUALITIES)
    assert safe >= balanced >= fast
    assert row.at("safe").dense_steps >= row.at("balanced").dense_steps >= row.at("fast").dense_steps
    assert (safe, row.at("safe").dense_steps) > (fast, row.at("fast").dense_steps)


@pytest.mark.parametrize("row, quality", [case for case in CASES if case.values[0].at(case.values[1]).tiling])
def test_settings_need_no_mask_at_their_tiling(row, quality):
    """What "block-sparse" promises: no partial tile, and the gain of the FLOPs."""
    options = {key: row.at(quality).options[key] for key in PATTERNS if key in row.at(quality).options}
    tiling = row.at(quality).tiling
    result = simulate(grid=row.base_size, q_tile=tuple(tiling["q"]), kv_tile=tuple(tiling["kv"]), **options)
    assert result.block_sparse
    assert result.speedup == pytest.approx(result.flop_speedup)


@pytest.mark.parametrize("quality", presets.QUALITIES)
def test_derived_settings_say_so(quality):
    for row in FILES:
        preset = row.at(quality)
        assert ("derived" in preset.source) == (preset.evidence == "derived"), row.name


def test_every_family_exists():
    known = {family.name for family in registry.families()}
    assert {family for row in FILES for family in row.families} <= known


def test_per_layer_map_covers_each_layer_once():
    row = next(row for row in GNA if row.name == "cosmos_predict2_2b")
    for quality in presets.QUALITIES:
        layers = [index for rule in row.at(quality).options["per_layer"] for index in rule["layers"]]
        assert sorted(layers) == list(range(28))


@pytest.mark.parametrize(
    "name, quality, window, stride, dense_steps",
    [
        ("flux_4k", "balanced", [80, 80], [16, 16], 9 / 28),
        ("hunyuan_video", "balanced", [18, 24, 24], [16, 8, 8], 15 / 50),
        ("hunyuan_video", "safe", [30, 40, 40], [1, 32, 8], 15 / 50),
        ("cosmos_7b", "safe", [16, 32, 48], [1, 8, 16], 12 / 35),
        ("cosmos_7b", "fast", [16, 24, 16], [1, 8, 16], 12 / 35),
    ],
)
def test_published_settings(name, quality, window, stride, dense_steps):
    preset = next(row for row in GNA if row.name == name).at(quality)
    assert (preset.options["window"], preset.options["stride"]) == (window, stride)
    assert preset.dense_steps == pytest.approx(dense_steps)
    assert preset.evidence == "published"


def test_resolve_prefers_the_resolution_of_the_size():
    assert presets.resolve("gna", "wan", WAN_SMALL).name == "wan_480p"
    assert presets.resolve("gna", "wan", WAN_LARGE).name == "wan_720p"
    assert presets.resolve("gna", "wan", WAN_LARGE, preset="wan_480p").name == "wan_480p"
    assert presets.resolve("gna", "wan", DIGITS, "fast").options["stride"] == [4, 16, 16]
    assert presets.resolve("gna", "wan", DIGITS, "fast").options["base_size"] == [16, 16, 16]


def test_resolve_without_a_fitting_preset():
    assert presets.resolve("gna", "wan", model(num_layers=2, num_attention_heads=2)) is None
    assert presets.resolve("gna", "no such family", WAN_SMALL) is None
    assert presets.resolve("gna", "wan", SimpleNamespace()) is None


def test_config_may_be_a_mapping():
    like_diffusers = SimpleNamespace(config={"num_layers": 28, "num_attention_heads": 16})
    assert presets.resolve("gna", "cosmos", like_diffusers).name == "cosmos_predict2_2b"
    like_diffusers.config["use_crossattn_projection"] = True  # Cosmos-Predict2.5 has other weights
    assert presets.resolve("gna", "cosmos", like_diffusers) is None


def test_recommend():
    assert presets.recommend("wan", WAN_LARGE) == "gna"
    assert presets.recommend("wan", model(num_layers=2, num_attention_heads=2)) is None


def test_available_filters():
    assert {row.name for row in presets.available("gna", "wan")} == {"wan_480p", "wan_720p", "moving_digits"}
    assert presets.available("no such method") == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gna", "wan", WAN_SMALL, "best"), "quality='best': legal are safe, balanced, fast"),
        (("gna", "wan", WAN_SMALL, "safe", "wan_480"), "nearest: wan_480p"),
        (("gna", "wan", WAN_SMALL, "safe", "zzz"), "there are: cogvideox"),
        (("gna", "wan", WAN_SMALL, "safe", "flux_4k"), "preset='flux_4k' is for models of flux; .* is of 'wan'"),
        (("vmoba", "wan", WAN_SMALL, "safe", "wan_480p"), "is for method 'gna', not 'vmoba'"),
        (
            ("gna", "wan", WAN_SMALL, "safe", "moving_digits"),
            r"\{'num_layers': 6, 'num_attention_heads': 2\}; .* \{'num_layers': 30, 'num_attention_heads': 12\}",
        ),
    ],
)
def test_resolve_errors_name_both_sides(arguments, message):
    with pytest.raises(ValueError, match=message):
        presets.resolve(*arguments)


def test_parse_reads_fractions_and_options():
    row = presets.parse(GOOD, "gna", "a.yaml")
    assert row.at("safe").dense_steps == pytest.approx(0.3)
    assert row.at("balanced").options == {"window": 2}
    assert row.at("fast").layers is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("title: a model", "", "title is missing"),
        ("title: a model", "title: 3", "title=3: must be a str"),
        ("source: nowhere", "source: nowhere\nwindow: 3", "unknown key 'window'"),
        ("method: gna", "method: moa", "method='moa': must be 'gna'"),
        ("3/10", "3/0", "qualities.safe.dense_steps='3/0'"),
        ("0.25", "1.5", "qualities.balanced.dense_steps=1.5"),
        ("0.25", "[0, 1.5]", "qualities.balanced.dense_steps=[0, 1.5]"),
        ("0.25", "[0, 0.1, 0.2]", "or two, of start and end"),
        ("evidence: derived", "evidence: rumour", "evidence='rumour': legal are published, derived"),
        ("window: 1,", "window: 1, layers: all,", "qualities.fast.layers='all'"),
        ("  fast: {window: 1, dense_steps: 0}", "", "must be safe, balanced, fast"),
        ("{window: 1, dense_steps: 0}", "{window: 1}", "qualities.fast: must be a mapping with dense_steps"),
    ],
)
def test_parse_errors_name_file_and_key(old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError) as error:
        presets.parse(GOOD.replace(old, new), "gna", "a.yaml")
    assert str(error.value).startswith("configs/gna/a.yaml: ")
    assert message in str(error.value)


def test_a_file_that_is_no_mapping():
    with pytest.raises(ValueError, match="configs/gna/a.yaml: holds list"):
        presets.parse("- 1", "gna", "a.yaml")


ROW = (
    "{model: a, tokens: 64, density: 0.5, speedup: 1.5, loss: 0.1, half: 0.01, cases: 9, machine: b, torch: '2', "
    "commit: c, date: d}"
)


def test_what_was_measured_bounds_a_preset_of_one_model():
    text = f"{GOOD}match: {{num_layers: 3}}\nmeasured:\n  fast:\n  - {ROW}\n  - {ROW.replace('64', '256')}\n"
    row = presets.parse(text, "gna", "a.yaml")
    assert row.at("fast").measured_tokens == (64, 256) and row.at("fast").measured[0]["half"] == 0.01
    assert row.at("safe").measured == () and row.at("safe").measured_tokens is None
    of_many = presets.parse(text.replace("match: {num_layers: 3}\n", ""), "gna", "a.yaml")
    assert of_many.at("fast").measured == row.at("fast").measured and of_many.at("fast").measured_tokens is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("fast:\n  -", "quick:\n  -", "measured: 'quick': legal are safe, balanced, fast"),
        ("loss: 0.1", "loss: .nan", "a row has model, tokens, density"),
        ("loss: 0.1, ", "", "a row has model, tokens, density"),
        ("tokens: 64", "tokens: many", "a row has model, tokens, density"),
        ("cases: 9", "cases: 9, ours: 1", "and nothing else"),
    ],
)
def test_measured_rows_are_whole(old, new, message):
    text = f"{GOOD}measured:\n  fast:\n  - {ROW}\n"
    assert old in text
    with pytest.raises(ValueError, match=message):
        presets.parse(text.replace(old, new), "gna", "a.yaml")


def test_the_embedded_models_presets_say_what_was_measured():
    """Each quality of what fits the two models that come with the package, at all sizes that were tuned."""
    digits = presets.resolve("gna", "wan", DIGITS)
    assert digits.name == "moving_digits" and digits.measured_tokens == (1024, 4096)
    names = [("gna", "moving_digits"), ("kv_pool", "transformers"), ("moa", "language"), ("draft", "video")]
    for method, name in names:
        row = next(one for one in presets.available(method) if one.name == name)
        assert all(row.at(quality).measured for quality in presets.QUALITIES)
