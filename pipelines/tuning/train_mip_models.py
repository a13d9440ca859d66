"""Pipelines with an IP-Adapter to be trained: the embedded small one, or one of a person's own."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.mip.ip_adapter_files import AdapterFile
from attn_plugins.pipelines.mip_sdxl import load
from attn_plugins.training import two_objects_model


def small_folder() -> Path:
    """The embedded pipeline of pictures of two objects, trained by examples/train_two_objects.py."""
    return Path(str(importlib.resources.files("attn_plugins") / "assets" / "two_objects"))


def load_adapted(model: str | Path, adapter: str | Path, *, image_encoder: str | Path | None = None) -> Any:
    """A pipeline on the CPU in float32, with the adapter of a file; the small one's pipeline has no autoencoder.

    Raises:
        ValueError, OSError: as `mip_sdxl.load`.
    """
    index = Path(model) / "model_index.json"
    if index.is_file() and '"vae": [\n    null' in index.read_text(encoding="utf-8"):
        pipe = two_objects_model.load(Path(model))
        AdapterFile.find(adapter).load_into(pipe, image_encoder)
        return pipe
    return load(model, adapter, image_encoder=image_encoder, device="cpu")


def reload_adapter(pipe: Any, adapter: str | Path) -> None:
    """Another adapter's file in the place of the one that is loaded, for the same image encoder."""
    encoder = pipe.image_encoder
    pipe.unload_ip_adapter()
    pipe.register_modules(image_encoder=encoder)
    AdapterFile.find(adapter).load_into(pipe, None)
