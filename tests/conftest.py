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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-dense-fallback", action="store_true", help="do not turn attn_plugins' own warnings into errors"
    )
    parser.addoption(
        "--random-problems", type=int, default=1000, help="random problems for the operators (seed = case number)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--allow-dense-fallback"):
        config.addinivalue_line("filterwarnings", "error:attn_plugins:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quiet_diffusers() -> None:
    """diffusers' chatter about random tiny models is not ours."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
