"""A setting as written, fitted to the grid at hand."""

import itertools

import pytest

from attn_plugins.methods.gna_setting import Fitted, Setting
from attn_plugins.plan.windows import axis_windows

COSMOS = (24, 44, 80)  # the token grid that Cosmos-Predict2's published settings are for


def fit(grid, *, base_size=None, small_grid="shrink", **setting):
    return Setting(**setting).fit(grid, base_size, small_grid)


def test_one_value_serves_every_axis():
    expected = Fitted((3, 3), (2, 2), (2, 2), (True, True))
    assert fit((8, 9), window=3, stride=2, dilation=2, causal=True) == expected
    assert fit((8, 9), window=(3, 4), stride=(1, 2), causal=(False, True)) == Fitted(
        (3, 4), (1, 2), (1, 1), (False, True)
    )


@pytest.mark.parametrize(
    ("share", "size", "window"), [(0.5, 9, 4), (0.25, 16, 4), (1.0, 7, 7), (0.01, 30, 1), (0.5, 1, 1)]
)
def test_a_share_of_the_axis(share, size, window):
    assert fit((size,), window=share, stride=1).window == (window,)


def test_the_whole_axis_and_automatic_strides():
    assert fit((5, 16), window=-1) == Fitted((5, 16), (1, 4), (1, 1), (False, False))
    assert fit((3, 40), window=(2, 24)).stride == (1, 6)  # a quarter of the window, at least 1
    assert fit((9,), window=-1, dilation=2).window == (4,)


# base_size: scale by actual / base, round, clamp to [2, X], [1, k], [1, X // k].


@pytest.mark.parametrize("grid", [(24, 44, 80), (24, 88, 160), (12, 22, 40), (24, 30, 52), (16, 45, 81), (3, 5, 7)])
def test_scaling_from_the_base_size(grid):
    setting = {"window": (8, 12, 16), "stride": (2, 4, 1), "dilation": (1, 2, 5)}
    found = fit(grid, base_size=COSMOS, **setting)
    for axis, (size, base) in enumerate(zip(grid, COSMOS, strict=True)):
        ratio = size / base
        window = min(max(round(setting["window"][axis] * ratio), 2), size)
        assert found.window[axis] == window
        assert found.stride[axis] == min(max(round(setting["stride"][axis] * ratio), 1), window)
        assert found.dilation[axis] == min(max(round(setting["dilation"][axis] * ratio), 1), size // window)


def test_the_base_size_itself_changes_nothing():
    setting = {"window": (1, 4, 16), "stride": (1, 1, 16), "dilation": (1, 11, 5)}
    found = fit(COSMOS, base_size=COSMOS, **setting)
    assert (found.window, found.stride, found.dilation) == tuple(setting.values())


@pytest.mark.parametrize("dilation", [1, (1, 11, 5)])
def test_one_frame_is_dense(dilation):
    found = fit((1, 44, 80), base_size=COSMOS, window=(8, 4, 16), stride=1, dilation=dilation)
    axes = axis_windows((1, 44, 80), found.window, found.stride, found.dilation, found.causal)
    assert all(axis.full for axis in axes)


def test_a_whole_axis_stays_whole():
    """As the rule has it: a scaled window of the whole axis leaves no room for a larger dilation."""
    found = fit((48, 44), base_size=(24, 44), window=(-1, 8), stride=1)
    assert (found.window, found.dilation) == ((48, 8), (1, 1))
    assert fit((12, 44), base_size=(24, 44), window=(-1, 8), stride=1, dilation=(4, 1)).window == (3, 8)


def test_strides_beside_a_share_or_a_whole_axis_scale_too():
    assert fit((20, 40), base_size=(40, 80), window=0.5, stride=8).stride == (4, 4)
    assert fit((20, 40), base_size=(40, 80), window=-1, stride=8).stride == (4, 4)


# Grids smaller than a window.


def test_shrinking_gives_up_dilation_before_the_window():
    assert fit((6,), window=8, stride=8) == Fitted((6,), (6,), (1,), (False,))
    assert fit((10,), window=4, stride=1, dilation=4) == Fitted((4,), (1,), (2,), (False,))
    assert fit((1, 1), window=(8, 8), stride=(4, 8), dilation=3) == Fitted((1, 1), (1, 1), (1, 1), (False, False))


@pytest.mark.parametrize(
    ("grid", "setting", "named"),
    [
        ((6, 20), {"window": 8}, "window=8 x dilation=1 does not fit axis 0 of grid .6, 20. .6 tokens."),
        ((20, 10), {"window": 4, "dilation": (1, 4)}, "window=4 x dilation=4 does not fit axis 1"),
        ((10,), {"window": 1.0, "dilation": 2}, "window=10 x dilation=2"),
    ],
)
def test_the_error_policy_names_what_does_not_fit_and_what_to_do(grid, setting, named):
    with pytest.raises(ValueError, match=named) as error:
        fit(grid, small_grid="error", **setting)
    assert "base_size" in str(error.value) and "shrink" in str(error.value)
    fit(grid, small_grid="shrink", **setting)


def test_the_error_policy_takes_what_fits():
    assert fit((8, 8), small_grid="error", window=8, stride=8).window == (8, 8)


def test_whatever_is_written_the_operator_takes_what_comes_out():
    windows, strides, dilations = (1, 3, 8, -1, 0.3, 1.0), ("auto", 1, 3), (1, 2, 7)
    for window, stride, dilation in itertools.product(windows, strides, dilations):
        if isinstance(window, int) and isinstance(stride, int) and 0 < window < stride:
            continue  # refused as written
        for size, base in itertools.product((1, 2, 3, 7, 16), (None, (1,), (5,), (16,), (64,))):
            found = fit((size,), base_size=base, window=window, stride=stride, dilation=dilation)
            axis_windows((size,), found.window, found.stride, found.dilation, found.causal)


# What is refused, and grids of other dimensions.


def test_fewer_values_than_axes_serve_the_last_axes_of_a_still_image():
    assert fit((1, 8, 9), window=(3, 4), stride=1) == Fitted((1, 3, 4), (1, 1, 1), (1, 1, 1), (False,) * 3)
    for wrong in ({"window": (3, 4)}, {"window": 3, "stride": (1, 1)}, {"window": 3, "dilation": (1,)}):
        with pytest.raises(ValueError, match="values for the 3 axes of grid .2, 8, 9."):
            fit((2, 8, 9), **wrong)
    with pytest.raises(ValueError, match="base_size=.8, 8.: 2 values for the 3 axes"):
        fit((2, 8, 9), window=3, base_size=(8, 8))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"window": 0}, "window=0"), ({"window": -3}, "window=-3"), ({"window": 1.5}, "window=1.5"),
        ({"window": 0.0}, "window=0.0"), ({"window": True}, "window=True"), ({"window": "half"}, "window='half'"),
        ({"window": (4, 0)}, "window=0"), ({"stride": 0}, "stride=0"), ({"stride": "most"}, "stride='most'"),
        ({"stride": 1.5}, "stride=1.5"), ({"dilation": 0}, "dilation=0"), ({"dilation": (1, 0.5)}, "dilation=0.5"),
        ({"window": 4, "stride": 5}, "stride=5 is larger than window=4: legal strides are 1..4"),
        ({"window": (8, 4), "stride": 5}, "stride=5 is larger than window=4"),
        ({"window": 4, "stride": (2, 6)}, "stride=6 is larger than window=4"),
    ],
)  # fmt: skip
def test_what_no_grid_could_make_legal_is_named(setting, named):
    with pytest.raises(ValueError, match=named):
        Setting(**setting)
