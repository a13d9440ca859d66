"""What a handle says, against numbers worked out by hand."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from attn_plugins import patch, report
from attn_plugins.metrics.flops import step_flops
from attn_plugins.plan.simulator import end_to_end
from attn_plugins.sequence import Sequence
from tests.support import tiny_pipelines
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
GRID = tiny_pipelines.PIPELINES["wan"].grid
DENSITY = 0.5  # what Windowed says of itself, whatever the sequence


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.build("wan")


@dataclass
class Case:
    handle: Any
    row: report.RootReport


@pytest.fixture
def ran(pipe):
    handle = patch(pipe, Windowed(), size=2, dense_steps=0.25)
    tiny_pipelines.run("wan", pipe, steps=4)
    yield Case(handle, report.analyse(handle)[0])
    handle.remove()


def test_before_the_first_forward_nothing_is_invented(pipe):
    model = tiny_pipelines.build("wan").transformer
    handle = patch(model, Windowed(), size=2)
    (row,) = report.analyse(handle)
    assert row.sequence is None and row.share is None and row.saved is None and row.gain(2.0) is None
    assert [group.density for group in row.groups] == [None]
    text = report.summarise(handle)
    assert "run the model once" in text and "?" in text
    handle.remove()


def test_groups_density_and_flops(ran):
    (group,) = ran.row.groups
    assert ran.row.sequence == Sequence(GRID)
    assert (group.kind, len(group.names)) == ("self", 2)
    assert group.density == pytest.approx(DENSITY)
    width = 24  # 2 heads of 12
    assert group.dense_flops == 2 * 4 * math.prod(GRID) ** 2 * width
    assert ran.row.saved == pytest.approx(1 - DENSITY)


def test_share_and_bounds(pipe, ran):
    model = pipe.transformer
    sites = [(f"blocks.{i}.{name}", kind) for i in range(2) for name, kind in (("attn1", "self"), ("attn2", "cross"))]
    share = step_flops(model, sites, Sequence(GRID)).share
    assert ran.row.share == pytest.approx(share)
    assert ran.row.dense_share == 0.25
    assert ran.row.gain(math.inf) == pytest.approx(end_to_end(math.inf, 0.75 * share))
    text = report.summarise(ran.handle)
    assert f"{end_to_end(math.inf, 0.75 * share):.2f}x; at this density" in text
    assert f"{end_to_end(1 / DENSITY, 0.75 * share):.2f}x" in text
    assert f"{share:.1%} of the FLOPs" in text and "first 25% of the steps" in text


def test_part_of_the_layers_is_part_of_the_share(pipe, ran):
    whole = ran.row.share
    ran.handle.remove()
    handle = patch(pipe, Windowed(), size=2, layers=[1])
    tiny_pipelines.run("wan", pipe, steps=1)
    (row,) = report.analyse(handle)
    assert row.share == pytest.approx(whole / 2)
    assert "1 of 4 sites" in report.summarise(handle)
    handle.remove()


def test_whole_steps_need_the_length_of_the_schedule(pipe):
    for num_steps, expected in ((None, None), (8, 0.25)):
        handle = patch(pipe, Windowed(), size=2, dense_steps=2, num_steps=num_steps)
        tiny_pipelines.run("wan", pipe, steps=3)
        (row,) = report.analyse(handle)
        assert row.dense_share == expected
        assert ("num_steps" in report.summarise(handle)) == (expected is None)
        handle.remove()


def test_too_few_tokens_count_as_dense(pipe):
    handle = patch(pipe, Windowed(), size=2, min_tokens=1000)
    with pytest.warns(UserWarning, match="no grid of the last forward had min_tokens=1000"):
        tiny_pipelines.run("wan", pipe, steps=1)
    (row,) = report.analyse(handle)
    assert row.groups[0].density == 1.0 and row.saved == 0.0
    handle.remove()


def test_explain_names_every_site_and_reason(ran):
    text = report.explain(ran.handle)
    for index in range(2):
        assert f"sparse  blocks.{index}.attn1" in text
        assert f"dense   blocks.{index}.attn2  (a site of kind 'cross')" in text
    assert report.ASSUMPTION in text


def test_a_unet_has_no_share_from_shapes():
    pipe = tiny_pipelines.build("sd15")
    with patch(pipe, Windowed(), size=2, min_tokens=0) as handle:
        tiny_pipelines.run("sd15", pipe, steps=1)
        (row,) = report.analyse(handle)
        assert row.share is None and row.saved is not None
        assert "not made of linear layers alone" in report.summarise(handle)


def test_joint_text_counts_in_the_sequence():
    pipe = tiny_pipelines.build("flux")
    with patch(pipe, Windowed(), size=2) as handle:
        tiny_pipelines.run("flux", pipe, steps=1)
        (row,) = report.analyse(handle)
    tokens = math.prod(tiny_pipelines.PIPELINES["flux"].grid) + 16
    assert row.groups[0].dense_flops == 2 * 4 * tokens**2 * 32
    assert "8x10 + 16 text" in "\n".join(report._summary(row))


def test_two_models_have_a_row_each():
    models = [tiny_pipelines.build("wan").transformer for _ in range(2)]
    handle = patch(models, Windowed(), size=2)
    assert len(report.analyse(handle)) == 2
    assert report.summarise(handle).count("windowed on WanTransformer3DModel") == 2
    del models
    handle.remove()


def test_a_model_that_is_gone():
    handle = patch(tiny_pipelines.build("wan").transformer, Windowed(), size=2)
    import gc

    gc.collect()
    assert report.analyse(handle) == [] and "gone" in report.summarise(handle)


def test_no_saving_at_full_density(ran):
    full = dataclasses.replace(ran.row.groups[0], density=1.0)
    row = dataclasses.replace(ran.row, groups=(full,))
    assert row.saved == 0 and "at most 1.00x" in "\n".join(report._summary(row))


def test_table_aligns():
    assert report.table([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc  d"]


def test_handle_uses_the_report(ran):
    assert ran.handle.summary() == report.summarise(ran.handle)
    assert torch.is_grad_enabled()
