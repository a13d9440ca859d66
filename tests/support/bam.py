"""Tiny dense models of every architecture that BAM mixes, experts of them, and mixtures made by the pipeline."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from attn_plugins.models.bam import ARCHITECTURES, of
from attn_plugins.models.bam.router import BamRouter
from attn_plugins.pipelines.upcycle.options import Expert, UpcycleSettings
from attn_plugins.pipelines.upcycle_bam import upcycle

logging.disable_progress_bar()

NAMES = tuple(name for name, row in ARCHITECTURES.items() if not row.vision)
MODES = ("all_params", "shared_kv", "mean")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PICTURES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip
# What is unlike in an architecture and off by default.
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "mistral": {"sliding_window": 5},
    "cohere": {"use_qk_norm": True},
    "gpt_neox": {"num_key_value_heads": None},
    "phi": {"qk_layernorm": True},
}
ROUTED = {  # parts of names in which experts may differ, so that one of them is the mixture with all its gates on it
    "all_params": ("self_attn.", ".attention.", ".mlp."),  # of ViT too
    "shared_kv": ("q_proj", "q_norm", "q_layernorm", "o_proj", ".dense.", ".mlp.", "query_key_value"),
    "mean": (".mlp.",),
}


def dense_config(name: str, **more: Any) -> Any:
    told = {key: value for key, value in {**SIZES, **SPECIAL[name], **more}.items() if value is not None}
    return AutoConfig.for_model(name, **told)


def dense(name: str, seed: int = 0, **more: Any) -> Any:
    """A dense model whose weights are far from their start: biases and norms say something too."""
    return spread(AutoModelForCausalLM.from_config(dense_config(name, **more)), seed)


def dense_vit(seed: int = 0, **more: Any) -> Any:
    """A dense picture classifier, in the same way."""
    config = transformers.ViTConfig(**{**PICTURES, **more})
    return spread(transformers.ViTForImageClassification(config), seed)


def spread(model: Any, seed: int) -> Any:
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (weight.ndim == 1))
    return model


def expert(base: Any, seed: int, mode: str = "all_params") -> Any:
    """The base with other weights where experts keep their own."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    heads, size = base.config.num_attention_heads, base.config.hidden_size
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ROUTED[mode]):
                more = torch.randn(weight.shape, generator=generator) * 0.2
                if mode == "shared_kv" and "query_key_value" in name:
                    more.view(heads, 3, size // heads, -1)[:, 1:] = 0  # q alone
                weight.add_(more)
    return model


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def mixed(experts: list[Any], mode: str = "all_params", folder: Path | None = None, **options: Any) -> Any:
    """The mixture of models: the first is the base, and one of them. Upcycled through files."""
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = [saved(model, place / f"expert-{number}") for number, model in enumerate(experts)]
        method = "btx" if mode == "mean" else "bam"
        rest = tuple(Expert(path, f"e{n}") for n, path in enumerate(paths[1:], 1))
        settings = UpcycleSettings(paths[0], rest, method, attention=mode, **options)
        upcycle(settings, place / "mixture")
        auto = getattr(transformers, of(experts[0].config.model_type).auto)
        return auto.from_pretrained(place / "mixture").eval()


@functools.cache
def _mixture(name: str, mode: str, count: int) -> Any:
    base = dense_vit() if name == "vit" else dense(name)
    return loud(mixed([base, *(expert(base, seed, mode) for seed in range(1, count))], mode))


def mixture(name: str, mode: str = "all_params", count: int = 3) -> Any:
    """A mixture of `count` experts that differ, with routers that prefer; a copy of one's own."""
    return copy.deepcopy(_mixture(name, mode, count))


def loud(model: Any) -> Any:
    """The model with routers as random as they may be: shares far from equal."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for router in routers(model):
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return model


def routers(model: Any) -> list[BamRouter]:
    return [module for module in model.modules() if isinstance(module, BamRouter)]


@contextlib.contextmanager
def all_to(model: Any, number: int) -> Iterator[None]:
    """Inside, every router gives all to one expert."""

    def forward(router: BamRouter) -> Any:
        def one_hot(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = x.new_full((*x.shape[:-1], len(router.weight)), -1e4, dtype=torch.float32)
            logits[..., number] = 0
            return logits, logits.softmax(-1)

        return one_hot

    for router in routers(model):
        router.forward = forward(router)
    try:
        yield
    finally:
        for router in routers(model):
            del router.forward


def ids(rows: int = 2, tokens: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))


def pixels(pictures: int = 2, size: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())
