"""`text_to_weight` from a MIP checkpoint: diffusers' `load_ip_adapter` reads the rest of the file and drops it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

_KEY = re.compile(r"(?:ip_adapter\.)?(\d+)\.text_to_weight\.weight")


def has_text_weights(path: str | Path) -> bool:
    """Whether a checkpoint is one of MIP, not of a plain IP-Adapter.

    Raises:
        ValueError: a file that cannot be read.
    """
    return any(_KEY.fullmatch(name) for name, _ in _adapter_tensors(_local(path)))


def read_text_weights(path: str | Path, widths: list[int]) -> list[torch.Tensor]:
    """One (C,) per cross-attention layer, in their order: the file numbers them 1, 3, 5, ...

    Args:
        path: a .bin or .safetensors file, or owner/name/path of one on the Hub.
        widths: C of each layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, has no `text_to_weight`, or is for other layers.
    """
    found = {int(match[1]): t for name, t in _adapter_tensors(_local(path)) if (match := _KEY.fullmatch(name))}
    if not found:
        raise ValueError(
            f"{path} has no text_to_weight: it is a plain IP-Adapter. Leave checkpoint=... out, then the merge is "
            "training-free"
        )
    wanted = list(range(1, 2 * len(widths), 2))
    if sorted(found) != wanted:
        raise ValueError(
            f"{path} has text_to_weight for {len(found)} layers, this model has {len(widths)} cross-attention layers: "
            "it is for another model"
        )
    for key, width in zip(wanted, widths, strict=True):
        if found[key].numel() != width:
            raise ValueError(
                f"{path}: {key}.text_to_weight has {found[key].numel()} channels, the layer {width}: a checkpoint for "
                "a model of another width"
            )
    return [found[key].reshape(-1) for key in wanted]


def _local(path: str | Path) -> Path:
    """The file here; from the Hub's cache, or the Hub, if it is the name of a file there."""
    file = Path(path)
    if file.is_file():
        return file
    parts = str(path).split("/")
    if len(parts) < 3 or file.is_absolute() or parts[0] in (".", "..", "~"):
        raise FileNotFoundError(f"no checkpoint at {path}: give a file, or owner/name/path of one on the Hub")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))


def _adapter_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the adapter's part."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt", device="cpu") as opened:
                names = [name for name in opened.keys() if name.startswith("ip_adapter.")]  # noqa: SIM118
                rows = [(name, opened.get_tensor(name)) for name in names]
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            part = state.get("ip_adapter", state) if isinstance(state, dict) else None
            if not isinstance(part, dict):
                raise ValueError("it holds no dictionary")
            rows = [(name, t) for name, t in part.items() if isinstance(t, torch.Tensor)]
    except Exception as error:  # each format has errors of its own for a file that ends too early
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read: is it truncated, or not a checkpoint? ({first})") from error
    yield from rows
