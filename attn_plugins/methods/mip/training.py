"""Training MIP: which weights, where the references are put (with gradients), and the adapter's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_plugins.methods.mip.checkpoint import read_adapter, write_adapter
from attn_plugins.sequence import Sequence
from attn_plugins.watching import LayerWatch


def adapted_layers(handle: Any) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a patch's layers, in the order of an adapter's file.

    Raises:
        ValueError: a patch that was made without train=True, or of a part of the layers.
    """
    (root,), (patched,) = handle.roots, handle.patches
    if not patched.config.train:
        raise ValueError("the patch has no text_to_weight to train: patch with train=True")
    if patched.skipped and any(name.endswith("attn2") for name, _ in patched.skipped):
        raise ValueError("an adapter is trained in all of its layers: patch without layers=...")
    for layer in sorted(patched.layers, key=lambda layer: layer.index):
        yield layer.name, root.get_submodule(layer.name)


def make_adapter_trainable(handle: Any) -> list[nn.Parameter]:
    """Gradients for `to_k_ip`, `to_v_ip` and `text_to_weight` of a patch with train=True, in float32; for nothing else
    of the model, the image projection included. Returns them.

    Raises:
        ValueError: as `adapted_layers`.
    """
    (root,) = handle.roots
    found: list[nn.Parameter] = []
    for _, module in adapted_layers(handle):
        adapter: Any = module.processor
        found += [adapter.to_k_ip[0].weight, adapter.to_v_ip[0].weight, module.mip.text_to_weight]  # type: ignore[union-attr, list-item]
    root.requires_grad_(False)
    for parameter in found:  # what is trained may not be in half precision
        parameter.requires_grad_(True).data = parameter.data.float()
    return found


def save_adapter(handle: Any, source: str | Path, path: str | Path) -> Path:
    """Write the trained adapter in the format of the published files, .safetensors or .bin.

    Args:
        handle: of a patch with train=True.
        source: the file that the adapter was loaded from: its image projection, which is not trained, is copied.
        path: loads by `pipe.load_ip_adapter`, and as `checkpoint=` of a patch.

    Raises:
        FileNotFoundError, ValueError: a source that is not there, or cannot be read.
    """
    rows = {}
    for number, (_, module) in enumerate(adapted_layers(handle)):
        adapter: Any = module.processor
        key = 2 * number + 1
        rows[f"{key}.to_k_ip.weight"] = adapter.to_k_ip[0].weight
        rows[f"{key}.to_v_ip.weight"] = adapter.to_v_ip[0].weight
        rows[f"{key}.text_to_weight.weight"] = module.mip.text_to_weight  # type: ignore[union-attr]
    tensors = {name: t.detach().cpu().contiguous() for name, t in rows.items()}
    return write_adapter(path, {"image_proj": read_adapter(source)["image_proj"], "ip_adapter": tensors})


class Strengths(LayerWatch):
    """Collects what each layer takes of each reference inside a block, t(s) w_i(s), with the gradient of t.

        with Strengths(handle) as strengths:
            model(...)
        strengths.maps      # of each layer (B, R, H, W)

    w is the paper's, detached: only `text_to_weight`, and what comes before the layer, gets a gradient.
    """

    gated = True

    def __init__(self, handle: Any) -> None:
        self.layers = [layer for patched in handle.patches for layer in patched.layers]
        self.maps: list[torch.Tensor] = []

    def take(self, weights: torch.Tensor, sequence: Sequence | None) -> None:
        """One layer's (B, R, S), by the processor."""
        if sequence is not None:
            self.maps.append(weights.unflatten(2, sequence.grid))
