"""What a page's blocks of Python find when they begin: models in the place of the reader's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import attn_plugins
from tests.support.pages import Small, replacing, small_wan

Make = Callable[[Path], dict[str, Any]]
STAGES: dict[str, Make] = {}


def namespace(page: str, folder: Path) -> dict[str, Any]:
    """Names of a page. `folder`: where its blocks run; files that it speaks of are made there."""
    plugins = SimpleNamespace(**{name: getattr(attn_plugins, name) for name in dir(attn_plugins) if name[:2] != "__"})
    plugins.patch = replacing(attn_plugins.patch, attn_plugins.unpatch)
    plugins.methods = SimpleNamespace(**{name: _module(f"methods.{name}") for name in ("mip", "moa", "moh", "regions")})
    found: dict[str, Any] = {"torch": torch, "attn_plugins": plugins, "Path": Path}
    return found | STAGES.get(page, _pipeline)(folder)


def stage(*pages: str) -> Callable[[Make], Make]:
    """Register what some pages begin with; others get a small video pipeline as `pipe`."""

    def register(make: Make) -> Make:
        STAGES.update(dict.fromkeys(pages, make))
        return make

    return register


def _pipeline(folder: Path) -> dict[str, Any]:
    return {"pipe": small_wan()}


@stage("index.md", "README.md")
def _start(folder: Path) -> dict[str, Any]:
    """`attn-plugins tune` has left its recipe."""
    from attn_plugins.pipelines.demo_model import load_pipeline

    (folder / "out" / "tune").mkdir(parents=True)
    with attn_plugins.patch(load_pipeline(), "gna") as handle:
        handle.save(folder / "out" / "tune" / "recipe.yaml")
    return {}


@stage("moa.md", "moba.md", "moh.md", "small_llama.md", "moa_search.md")
def _language(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from attn_plugins.methods.moa.patterns import uniform
    from attn_plugins.methods.moh import calibrate
    from attn_plugins.pipelines.small_llama import small_llama

    model, tokenizer = small_llama()
    ids = tokenizer("import os\n" * 20, return_tensors="pt")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    (folder / "out" / "moa").mkdir(parents=True)
    for path in (folder / "plan.json", folder / "out" / "moa" / "plan.json"):
        uniform(4, 8, 4, beta=0.5).save(path)
    return {
        "model": model, "tokenizer": tokenizer, "ids": ids, "mask": batch["attention_mask"], "batch": batch,
        "batches": [{"input_ids": ids}], "prompts": [{"input_ids": ids}], "pipe": lambda inputs: model(**inputs),
        "calibrate": calibrate, "AutoModelForCausalLM": AutoModelForCausalLM,
    }  # fmt: skip


@stage("families.md")
def _seeing(folder: Path) -> dict[str, Any]:
    from tests.support import tiny_vision_language

    return {"model": tiny_vision_language.build("Llava")}


@stage("regions.md")
def _regions(folder: Path) -> dict[str, Any]:
    from PIL import Image

    from tests.support import tiny_pipelines

    pipe = tiny_pipelines.build("sd15")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(folder / "dog_mask.png")
    masks = torch.zeros(1, 2, 8, 8)
    masks[:, 0, :, :4] = masks[:, 1, :, 4:] = 1
    return {"pipe": Small(pipe, **tiny_pipelines.PIPELINES["sd15"].call, num_inference_steps=2), "masks": masks}


@stage("mip.md")
def _references(folder: Path) -> dict[str, Any]:
    """The page speaks of Stable Diffusion XL, then of FLUX, then of the first again."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    from tests.support import flux_adapters, ip_adapters, tiny_pipelines

    def seeing(pipe: Any) -> Any:
        pipe.register_modules(
            image_encoder=ip_adapters.image_encoder(),
            feature_extractor=CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        )
        return pipe

    class Adapted(Small):
        """Loads a made-up adapter, whatever released one it is asked for."""

        def load_ip_adapter(self, name: str, **_: Any) -> None:
            if hasattr(self.pipe, "unet"):
                ip_adapters.load(self.pipe, ip_adapters.checkpoint(self.pipe.unet))
            else:
                flux_adapters.load(self.pipe, flux_adapters.checkpoint(self.pipe.transformer))

    sdxl, flux = seeing(tiny_pipelines.build("sdxl")), seeing(flux_adapters.pipeline(0))
    ip_adapters.write(ip_adapters.checkpoint(sdxl.unet), folder / "ip-adapter_sdxl.bin")
    calls = {name: {**tiny_pipelines.PIPELINES[name].call, "num_inference_steps": 2} for name in ("sdxl", "flux")}
    cat, dog = (Image.new("RGB", (30, 30), colour) for colour in ("orange", "brown"))
    return {
        "pipe": Adapted(sdxl, **calls["sdxl"]), "flux": Adapted(flux, **calls["flux"] | {"max_sequence_length": 32}),
        "cat": cat, "dog": dog,
    }  # fmt: skip


@stage("bam.md")
def _mixtures(folder: Path) -> dict[str, Any]:
    from torch.nn.functional import cross_entropy

    from tests.support import bam

    base = bam.dense("llama")
    bam.mixture("llama").save_pretrained(folder / "mixture")
    ids = bam.ids()
    return {
        "model": base, "code_model": bam.expert(base, 1), "prose_model": bam.expert(base, 2),
        "cross_entropy": cross_entropy, "batch": {"input_ids": ids, "labels": ids},
    }  # fmt: skip


@stage("continue_tuning.md")
def _clips(folder: Path) -> dict[str, Any]:
    return {"pipe": small_wan(), "clips": [(torch.zeros(1, 3, 9, 32, 32), "a cat")], "folder": folder}


@stage("trained-agent.md")
def _classifier(folder: Path) -> dict[str, Any]:
    """A small classifier in the place of the hub's."""
    import transformers

    from tests.support.agent_layers import state_dict

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(folder / "vit")
    state = state_dict("deit", 24, 2, (4, 4), 4, own=1)
    return {"AdamW": torch.optim.AdamW, "state_dict": {f"blocks.0.attn.{name}": t for name, t in state.items()}}


HUB = {"google/vit-base-patch16-224": "vit"}  # names that pages load, and the folders that stand in for them


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"attn_plugins.{name}")
