"""Safetensors written a piece of a tensor at a time: sizes are known before, so the header can be, and no shard has to
be in memory. A shard gets its name when it is whole and on the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from attn_plugins.pipelines.upcycle.checkpoint import FLOATS, bytes_of

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
Shapes = dict[str, tuple[int, ...]]


def shards(shapes: Shapes, dtype: torch.dtype, most: int) -> dict[str, list[str]]:
    """File name -> its tensors, in order, each file of `most` bytes at most unless one tensor is larger."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = bytes_of(shape, dtype)
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": names for n, names in enumerate(groups, 1)}


def write_shard(
    path: Path,
    names: Iterable[str],
    shapes: Shapes,
    dtype: torch.dtype,
    pieces: Callable[[str], Iterator[torch.Tensor]],
    tick: Callable[[str, int], None],
) -> None:
    """Write a shard under another name, flush it to the disk, rename it.

    Args:
        pieces: gives a tensor as pieces of its rows, in order.
        tick: called with a tensor's name and bytes that were written.

    Raises:
        RuntimeError: pieces that are no whole tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + bytes_of(shapes[name], dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = 0
            for piece in pieces(name):
                flat = piece.to(dtype).contiguous().flatten()
                file.write(flat.view(torch.uint8).numpy().data)
                written += flat.numel()
                tick(name, flat.numel() * dtype.itemsize)
            if written != math.prod(shapes[name]):
                raise RuntimeError(
                    f"{name}: {written:,} numbers for shape {shapes[name]}; this is our fault, not yours"
                )
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process is: two that wrote the same files would rename each other's unfinished ones. The system
    lets go of it when a process ends, however that was.

    Raises:
        ValueError: another one is, or was until now, and the folder has its name.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where a file that is open cannot be replaced
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another run is writing there; wait for it, or give another folder") from error
        except OSError:
            pass  # a file system without locks
        if not folder.exists() or not os.path.samestat(os.fstat(held), folder.stat()):
            raise ValueError(f"{folder}: another run has finished there meanwhile")
        yield
    finally:
        os.close(held)


def settle(folder: Path) -> None:
    """Flush all files of a folder, and what is called how in it, to the disk: a rename may get there before them."""
    for path in [*folder.iterdir(), folder]:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:  # Windows opens no folders
            continue
        try:
            os.fsync(file)
        except OSError:  # a file system that cannot, or Windows, which flushes only what is open for writing
            pass
        finally:
            os.close(file)


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
