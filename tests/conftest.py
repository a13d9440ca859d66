"""Quiet, offline, one thread; a fallback to dense that a test did not ask for is an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `tests.support`, whatever the working directory

import pytest
import torch

torch.set_num_threads(1)  # two OpenMP threads on a busy machine make tiny pipelines a hundred times slower
if (here := str(Path(__file__).resolve().parent)) in sys.path:
    sys.path.remove(here)  # from there, tests/triton would pose as triton
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-dense-fallback", action="store_true", help="do not turn attn_plugins' own warnings into errors"
    )
    parser.addoption(
        "--random-problems", type=int, default=1000, help="random problems for the operators (seed = case number)"
    )
    parser.addoption("--models", type=Path, help="compare the classes that tests/patches found green with this file")
    parser.addoption("--write-models", action="store_true", help="write the file of --models instead")


def pytest_configure(config: pytest.Config) -> None:
    # Files of one name in several folders, and nothing put on sys.path.
    config.option.importmode = "importlib"
    if config.getoption("--models"):
        from tests.support.green import Green

        config.pluginmanager.register(Green(config.getoption("--models"), config.getoption("--write-models")))
    if not config.getoption("--allow-dense-fallback"):
        config.addinivalue_line("filterwarnings", "error:attn_plugins:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreted() -> None:
    """Triton's kernels run on CPU tensors, bfloat16 included; skips where they cannot."""
    from attn_plugins.ops.target import triton_target
    from tests.support.interpreter import interpreting, repair_interpreter

    if not interpreting():
        pytest.skip("there is a GPU (tests/gpu is for it): set TRITON_INTERPRET=1 to interpret the kernels instead")
    if triton_target() != "interpreter":
        pytest.skip("triton is not installed")
    repair_interpreter()


@pytest.fixture(scope="session")
def quiet_diffusers() -> None:
    """diffusers' chatter about random tiny models is not ours."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
