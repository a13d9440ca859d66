"""What of a model is trained, everything or a LoRA, and how a video transformer is saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of attention, as diffusers calls them
# of diffusers, and of transformers
CHECKPOINTING = "enable_gradient_checkpointing", "gradient_checkpointing_enable"
LORA = "continued"  # the adapter's name


def make_trainable(
    model: Any,
    *,
    lora: int = 0,
    checkpointing: bool = False,
    seed: int = 0,
    projections: Sequence[str] = PROJECTIONS,
) -> None:
    """Switch gradients on: for all of a model, or for a new LoRA of rank `lora` on its attention projections.

    The model is one of diffusers or of transformers. checkpointing: recompute activations in the backward. seed: of the
    LoRA's random half; the global state is kept. projections: names of linear layers, or ends of names.

    Raises:
        ValueError: a negative rank, or a model that has a LoRA of this name already.
        ImportError: a LoRA without peft.
    """
    if lora < 0:
        raise ValueError(f"lora={lora}: give a rank of 1 or more, or 0 to train all weights")
    model.train()
    model.requires_grad_(not lora)
    if lora:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("a LoRA needs peft: pip install attn-plugins[train]") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(r=lora, lora_alpha=lora, target_modules=list(projections)), LORA)
        for parameter in trained(model):  # the rest may be in half precision, what is trained may not
            parameter.data = parameter.data.float()
    if checkpointing:
        getattr(model, next(name for name in CHECKPOINTING if hasattr(model, name)))()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_trained(model: Any, folder: Path) -> None:
    """Safetensors for diffusers: a LoRA for a `WanPipeline`, or a `transformer` folder for `from_pretrained`."""
    if LORA in getattr(model, "peft_config", {}):
        from diffusers import WanPipeline
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(model, adapter_name=LORA)
        WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    else:
        model.save_pretrained(folder / "transformer")
