"""Grid and step are per thread: one model, two resolutions at once."""

from __future__ import annotations

import threading

import pytest
import torch

import attn_plugins
from tests.support.matrix import ON_GRID
from tests.support.tiny_models import MODELS, forward
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.mark.parametrize("family", ON_GRID)
def test_two_threads_two_sizes(family: str) -> None:
    tiny = MODELS[family]
    model = tiny.build()
    attn_plugins.patch(model, Windowed(), min_tokens=0)
    alone = [forward(model, tiny.inputs(1, size)) for size in (0, 1)]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def run(size: int) -> None:
        start.wait()
        for turn in range(8):
            if not torch.equal(forward(model, tiny.inputs(1, size)), alone[size]):
                wrong.append(f"size {size}, turn {turn}")

    threads = [threading.Thread(target=run, args=(size,)) for size in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unpatching_while_a_forward_runs_ends_it_dense() -> None:
    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    dense = forward(model, inputs)
    handle = attn_plugins.patch(model, Windowed())
    layer = handle.patches[0].layers[0]
    processor = layer.processor

    class Leaving(type(processor)):  # type: ignore[misc]
        def __call__(self, call):  # type: ignore[no-untyped-def]
            handle.remove()
            return super().__call__(call)

    layer.processor = Leaving(processor.config)
    half = forward(model, inputs)
    assert not torch.equal(half, dense)
    assert torch.equal(forward(model, inputs), dense)
