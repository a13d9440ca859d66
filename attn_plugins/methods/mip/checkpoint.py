"""Files of IP-Adapters, and `text_to_weight` in those of MIP, which diffusers' `load_ip_adapter` drops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

PARTS = ("image_proj", "ip_adapter")
_KEY = re.compile(r"(?:ip_adapter\.)?(\d+)\.text_to_weight\.weight")


def has_text_weights(path: str | Path) -> bool:
    """Whether a checkpoint is one of MIP, not of a plain IP-Adapter.

    Raises:
        ValueError: a file that cannot be read.
    """
    return any(_KEY.fullmatch(name) for name, _ in _tensors(_local(path)))


def read_text_weights(path: str | Path, widths: list[int]) -> list[torch.Tensor]:
    """One (C,) per cross-attention layer, in their order: the file numbers them 1, 3, 5, ...

    Args:
        path: a .bin or .safetensors file, or owner/name/path of one on the Hub.
        widths: C of each layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, has no `text_to_weight`, or is for other layers.
    """
    found = {int(match[1]): t for name, t in _tensors(_local(path)) if (match := _KEY.fullmatch(name))}
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


def read_adapter(path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """Both parts of an IP-Adapter's file, {"image_proj": ..., "ip_adapter": ...}.

    Args:
        path: as of `read_text_weights`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or lacks a part.
    """
    file = _local(path)
    found = {part: dict(_tensors(file, part)) for part in PARTS}
    found = {part: {name.removeprefix(f"{part}."): t for name, t in rows.items()} for part, rows in found.items()}
    for part, rows in found.items():
        if not rows:
            raise ValueError(f"{path} has no {part!r}: it is no IP-Adapter's file")
    return found


def write_adapter(path: str | Path, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """Write both parts as the published files have them; the ending says the format, .safetensors or .bin.

    Raises:
        ValueError: another ending.
    """
    file = Path(path)
    if file.suffix not in (".safetensors", ".bin"):
        raise ValueError(f"{file}: an adapter's file ends in .safetensors or .bin")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save({part: dict(rows) for part, rows in parts.items()}, file)
    else:
        from safetensors.torch import save_file

        flat = {f"{part}.{name}": t.contiguous() for part, rows in parts.items() for name, t in rows.items()}
        save_file(flat, file, metadata={"format": "pt"})
    return file


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


def _tensors(file: Path, wanted: str = "ip_adapter") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a part."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt", device="cpu") as opened:
                names = [name for name in opened.keys() if name.startswith(f"{wanted}.")]  # noqa: SIM118
                rows = [(name, opened.get_tensor(name)) for name in names]
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            part = state.get(wanted, state if wanted == "ip_adapter" else {}) if isinstance(state, dict) else None
            if not isinstance(part, dict):
                raise ValueError("it holds no dictionary")
            rows = [(name, t) for name, t in part.items() if isinstance(t, torch.Tensor)]
    except Exception as error:  # each format has errors of its own for a file that ends too early
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read: is it truncated, or not a checkpoint? ({first})") from error
    yield from rows
