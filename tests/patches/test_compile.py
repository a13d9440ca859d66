"""torch.compile on patched models: whole, in one graph, and by repeated blocks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import attn_plugins
from attn_plugins.method import AttentionCall, MethodConfig, Processor, SiteKind
from attn_plugins.patches import interception
from tests.support.matrix import EVERY, METHODS, fits, method, settings
from tests.support.tiny_models import MODELS, forward, wan
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


class ScaledProcessor(Processor):
    """Reads the sequence, as a real method does, and uses plain operators only."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        assert call.sequence is not None
        return call.q * (call.sequence.tokens / 100)


class RefusingProcessor(ScaledProcessor):
    def refuses(self, call: AttentionCall) -> str | None:
        return "never in compiled code"


class Scaled(Windowed):
    name = "scaled"
    processor_class: type[Processor] = ScaledProcessor

    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor | None:
        return _processor(self.processor_class)


class Refusing(Scaled):
    name = "refusing"
    processor_class = RefusingProcessor


@functools.cache
def _processor(cls: type[Processor]) -> Processor:
    return cls()


def chosen(name: str) -> Any:
    return Scaled() if name == "scaled" else method(name)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


MODELS_OF_DEPTH = [("wan", False), ("wan", True), ("sd15", False), ("hunyuan_video", False)]
# in depth for one of each way of planning; the other methods differ in what they plan
PLANNERS = [name for name in METHODS if name != "windowed" and fits(name, "wan")]
DEEP = ("scaled", "gna", "vmoba") if EVERY else ("scaled", "gna")
DEPTH = [(*row, name) for name in DEEP for row in MODELS_OF_DEPTH]
DEPTH += [("wan", False, name) for name in PLANNERS if name not in DEEP]


@pytest.mark.parametrize(("family", "in_place", "name"), DEPTH)
def test_one_graph_and_back(family: str, in_place: bool, name: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    dense = forward(model, inputs)
    handle = attn_plugins.patch(model, chosen(name), **settings(name))
    eager = forward(model, inputs)
    compiled = model if in_place else torch.compile(model, fullgraph=True, backend="aot_eager")
    if in_place:
        model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled, inputs), eager)
    assert counters["stats"]["unique_graphs"] == 1
    handle.remove()
    torch.testing.assert_close(forward(compiled, inputs), dense)


# one per way of calling attention and of reading the sequence; the other families differ from these by data
WAYS = (
    "sdxl", "sd3", "flux", "cogvideox", "ltx_video", "cosmos", "pixart", "lumina_next", "cogview4", "z_image", "prx",
    "chroma", "flux2", "qwen_image", "stable_cascade", "kandinsky22", "flux_controlnet", "ltx2", "latte", "helios",
)  # fmt: skip


# half of them, and all with EVERY_PAIR=1 (`make matrix`)
FIRST = WAYS if EVERY else WAYS[::2]


@pytest.mark.parametrize("family", FIRST)
def test_other_families_compile_to_one_graph(family: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    attn_plugins.patch(model, Scaled(), min_tokens=0, dense_steps=0, size=2)
    eager = forward(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled, inputs), eager)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first graph of a process must not guard on what no call had set yet."""
    monkeypatch.setattr(interception, "_running", interception._Running())
    tiny = MODELS["wan"]
    model = tiny.build()
    attn_plugins.patch(model, Scaled(), dense_steps=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for graphs, step in ((1, 900), (1, 900), (2, 500), (2, 300), (2, 900)):  # one for dense steps, one for the others
        forward(compiled, {**tiny.inputs(1, 0), "timestep": torch.tensor([step])})
        assert counters["stats"]["unique_graphs"] == graphs


def test_patching_a_compiled_model() -> None:
    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dense = forward(compiled, inputs)
    attn_plugins.patch(compiled, Scaled())
    assert not torch.equal(forward(compiled, inputs), dense)
    torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs))
    attn_plugins.unpatch(compiled)
    assert torch.equal(forward(compiled, inputs), dense)


def test_dense_steps_and_new_grids_are_seen_by_the_graph() -> None:
    tiny = MODELS["wan"]
    model = tiny.build()
    attn_plugins.patch(model, Scaled(), dense_steps=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in (900, 500, 900):
        for size in (0, 1):
            inputs = {**tiny.inputs(1, size), "timestep": torch.tensor([step])}
            torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs))


def test_repeated_blocks_share_a_graph() -> None:
    tiny = MODELS["wan"]
    model, inputs = wan(layers=6), tiny.inputs(1, 0)
    attn_plugins.patch(model, Scaled())
    eager = forward(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(model, inputs), eager)
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_that_differ_stay_different() -> None:
    tiny = MODELS["wan"]
    model, inputs = wan(layers=6), tiny.inputs(1, 0)
    attn_plugins.patch(model, Scaled(), layers="2-3")
    eager = forward(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(model, inputs), eager)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_refusal_is_said_when_the_graph_is_made() -> None:
    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    dense = forward(model, inputs)
    attn_plugins.patch(model, Refusing())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="attn_plugins: .*never in compiled code"):
        torch.testing.assert_close(forward(compiled, inputs), dense)
