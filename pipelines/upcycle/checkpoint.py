"""A dense checkpoint on disk: safetensors alone, checked by its headers, read a tensor or a few rows at a time."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_HEADER_LIMIT = 100_000_000  # bytes, as in safetensors itself


@dataclass(frozen=True)
class Checkpoint:
    """files: tensor -> its shard; shapes: tensor -> its shape. Open with `Checkpoint.open`."""

    folder: Path
    config: Any
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, source: str) -> Checkpoint:
        """A folder, or the name of a repository on the Hub, whose safetensors are then fetched.

        Raises:
            ValueError: no model there, pickles alone, a missing or truncated shard, a quantised model.
        """
        folder = _folder(source)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json there; give the folder of a model that save_pretrained wrote")
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{folder} is quantised: a mean of quantised weights means nothing; give the original model"
            )
        files, shapes = {}, {}
        for path, promised in _shards(folder).items():
            header = read_header(path)
            missing = sorted(promised - header.keys())
            if missing:
                raise ValueError(f"{path} lacks {missing[0]}, which {folder / INDEX} says it has")
            for name, row in header.items():
                if row["dtype"] in FLOATS:
                    files[name], shapes[name] = path, tuple(row["shape"])
        return cls(folder, config, files, shapes)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, in memory that is its own. The shard is closed again: mapped pages count as memory too."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of a tensor of one dimension or more."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as shard:
            return shard.get_slice(name)[start:stop]

    def fingerprint(self) -> list[Any]:
        """What changes when the files do."""
        stats = [(path, os.stat(path)) for path in sorted({*self.files.values(), self.folder / "config.json"})]
        return [str(self.folder.resolve()), *([path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats)]


def read_header(path: Path) -> dict[str, Any]:
    """{name: {dtype, shape, data_offsets}} of a safetensors file.

    Raises:
        ValueError: not such a file, or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(
                f"{path} is truncated, or no safetensors file: {size:,} bytes, with a header of {length:,}"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            promised = 8 + length + max((row["data_offsets"][1] for row in header.values()), default=0)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file: its header does not say what is in it") from error
    if size != promised:
        what = "truncated" if size < promised else "damaged"
        raise ValueError(f"{path} is {what}: {size:,} bytes, where its header promises {promised:,}")
    return header


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith("."):
        raise ValueError(f"{source}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
        )
    except Exception as error:  # the hub's client raises dozens of kinds
        raise ValueError(f"{source} is neither a folder nor to be had from the Hub: {error}") from error


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Shard -> the names that the index says are in it; every file there, or an error."""
    found: dict[Path, set[str]] = {}
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            for name, file in weight_map.items():
                found.setdefault(folder / file, set()).add(name)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} does not say which shard has what: it is damaged") from error
    elif (folder / SINGLE).is_file():
        found[folder / SINGLE] = set()
    else:
        pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
        if pickles:
            raise ValueError(
                f"{folder} has its weights as pickles ({pickles[0]}), which run any code when they are read: refused. "
                "Load the model where you trust it, and save_pretrained writes safetensors"
            )
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} there")
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {folder / INDEX} names: the download or copy is not complete")
    return found
