"""A small pipeline of Stable Diffusion 1.5's kind for pictures of two objects, with a stock IP-Adapter, new weights.

Its latents are the pictures themselves, 4 x 4 px stacked into one position (`to_latents`, undone by
`F.pixel_shuffle(latents, CELL)`), so that there is no autoencoder; the pipeline runs with output_type="latent".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.training.two_objects import CLASSES, SIZE

CELL = 4  # px, side of what is stacked into one position
GRID = SIZE // CELL
WIDTH = 64  # of text tokens
EMBEDDING = 32  # of a reference
TOKENS = 4  # of a reference, of the IP-Adapter
WORDS = (*CLASSES, "a", "and")
ADAPTER = "ip_adapter/ip-adapter.safetensors"  # in the folder of the pipeline
LENGTH = 8  # tokens of a prompt, begin and end included


def to_latents(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in -1..1 to (B, 48, H / 4, W / 4)."""
    return F.pixel_unshuffle(pictures, CELL)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of the letters and the few words that prompts are made of."""
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = {one: number for number, one in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # from the end: "a", "an</w>" is never made on the way to a longer word
            pair = parts[-2], parts[-1]
            if pair not in merges:
                merges.append(pair)
            parts[-2:] = ["".join(pair)]
            tokens.setdefault(parts[-1], len(tokens))
    for end in ("<|startoftext|>", "<|endoftext|>"):
        tokens[end] = len(tokens)
    return tokens, merges


def tokenizer() -> Any:
    """CLIP's, with these."""
    from transformers import CLIPTokenizer

    tokens, merges = vocabulary()
    return CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=LENGTH)


def text_encoder(words: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=LENGTH, projection_dim=WIDTH, **ends,
    )  # fmt: skip
    return CLIPTextModel(config)


def unet() -> Any:
    """One level, so that every cross-attention sees all of the grid."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=GRID, in_channels=3 * CELL**2, out_channels=3 * CELL**2, block_out_channels=(64,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1,
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> Any:
    """The model predicts the picture: one so small cannot carry the noise of 48 channels to its end."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="sample", clip_sample=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=4, projection_dim=EMBEDDING,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def load_new_adapter(unet: Any, seed: int = 0) -> None:
    """A stock IP-Adapter of T = 4 with new weights, by diffusers' own loading."""
    draw = torch.Generator().manual_seed(seed)

    def new(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) * columns**-0.5

    crosses = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    widths = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in crosses]
    adapter = {}
    for number, width in enumerate(widths):
        for part in ("k", "v"):
            adapter[f"{2 * number + 1}.to_{part}_ip.weight"] = new(width, WIDTH)
    projection = {
        "proj.weight": new(TOKENS * WIDTH, EMBEDDING), "proj.bias": torch.zeros(TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])


def adapter_of(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Its weights, as the published files have them."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    names = {"image_embeds": "proj", "norm": "norm"}
    first = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": t for name, t in projection.state_dict().items()}
    second = {}
    crosses = [processor for name, processor in unet.attn_processors.items() if name.endswith("attn2.processor")]
    for number, processor in enumerate(crosses):
        second[f"{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        second[f"{2 * number + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return {
        part: {name: t.detach() for name, t in rows.items()}
        for part, rows in (("image_proj", first), ("ip_adapter", second))
    }


def pipeline(unet: Any, text: Any, words: Any, vision: Any) -> Any:
    """A stock `StableDiffusionPipeline` without an autoencoder."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=words, unet=unet, scheduler=scheduler(), safety_checker=None,
        feature_extractor=CLIPImageProcessor(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        image_encoder=vision, requires_safety_checker=False,
    )  # fmt: skip


def load(folder: Path) -> Any:
    """The pipeline in a folder of `save`, without the adapter; on the CPU, in float32."""
    from diffusers import StableDiffusionPipeline

    absent: dict[str, Any] = {"vae": None, "safety_checker": None}
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path, adapted: Any, text: Any, words: Any, vision: Any) -> None:
    """The pipeline's folder, and beside it the adapter's file, `ADAPTER`."""
    from safetensors.torch import save_file

    plain = unet()
    state = adapted.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    pipeline(plain, text, words, vision).save_pretrained(folder)
    index = folder / "model_index.json"  # whichever of its two processors transformers has taken
    index.write_text(index.read_text(encoding="utf-8").replace("ProcessorPil", "Processor"), encoding="utf-8")
    tokens, merges = vocabulary()  # as transformers 4 reads them
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    flat = {f"{part}.{name}": t.contiguous() for part, rows in adapter_of(adapted).items() for name, t in rows.items()}
    (folder / ADAPTER).parent.mkdir(exist_ok=True)
    save_file(flat, folder / ADAPTER, metadata={"format": "pt"})
