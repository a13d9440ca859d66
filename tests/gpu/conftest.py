"""Tests that need a GPU: what only its size, its memory, its scheduler and its compiler can show.

    python -m pytest tests/gpu

Elsewhere they are skipped, with the reason. ATTN_PLUGINS_GPU_REHEARSAL=cpu (or =triton: interpreted, slow) runs them
tiny on a CPU by that backend, so that no test turns out broken when a GPU is at hand; what only a GPU has is skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu.place import Place

HERE = Path(__file__).resolve().parent
REHEARSAL = os.environ.get("ATTN_PLUGINS_GPU_REHEARSAL", "")


def _missing() -> str | None:
    """Why these tests cannot run here."""
    if not torch.cuda.is_available():
        return "needs a GPU: torch.cuda.is_available() is False"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: the kernels would be interpreted instead of run on the GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if REHEARSAL else _missing()
    if reason:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def place() -> Place:
    """Where to run, by which backend, at which size."""
    if REHEARSAL == "triton":  # interpreted
        from tests.support.interpreter import repair_interpreter

        repair_interpreter()
    return Place(torch.device("cpu"), REHEARSAL, tiny=True) if REHEARSAL else Place(torch.device("cuda"), "triton")


@pytest.fixture
def on_gpu(place: Place) -> None:
    """For tests of what a CPU does not have."""
    if place.tiny:
        pytest.skip("a rehearsal on a CPU: there is no such thing as this test looks at")


@pytest.fixture
def room(place: Place) -> Callable[[float], None]:
    """Skips where the GPU has less free memory than so many GiB."""

    def ask(gib: float) -> None:
        if not place.tiny:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 2**30
            if free < gib:
                pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, there are {free:.0f}")

    return ask


@pytest.fixture(autouse=True)
def _tidy():
    """Compiled graphs and cached blocks of one test are not the next one's."""
    torch._dynamo.reset()
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
