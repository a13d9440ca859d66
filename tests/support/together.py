"""Runs a function in several processes at once that talk through gloo."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def together(function: Callable[..., Any], *args: Any, processes: int = 2) -> list[Any]:
    """`function(rank, *args)` in `processes` processes of one thread each; what each of them returned.

    The function stands at the top of a module: the processes import it. A fallback to dense that it does not expect is
    an error, as everywhere in the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one, (processes, folder, function, args), nprocs=processes)
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(processes)]


def _one(rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)})
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("error", message="attn_plugins", category=UserWarning)
    meeting = Path(folder, "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        torch.save(function(rank, *args), _result(folder, rank))
    finally:
        torch.distributed.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.pt")
