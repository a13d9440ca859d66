"""The dense architectures that BAM mixes, as data: where their projections are and what is unlike in them.

All else (rotary embeddings, norms, biases, the order of a block) is the business of their own classes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A dense model of transformers.

    Attributes:
        name: its model_type, and of its module.
        prefix: of its class names.
        body: the attribute that holds the model without its head; attention: of a layer, its attention.
        layer: the rest of a layer's class name.
        q, k, v, o: projections of the attention; fused: one of q, k and v per head in a row, where it has that.
        q_norm, k_norm: norms over a head, where it may have those.
        up: the projections into a feed-forward's width: a gate and another, or one; down: the one out of it.
        parallel: attention and feed-forward stand side by side.
        head: the rest of the class name of the model with its head; pictures are told apart, text is gone on with.
        head_bias: the output head has a bias. head_settings: what its class takes over from the config.
        numbered: an attention is told which layer it is of.
        file_names: parts of tensors' names that files spell otherwise than the model does, (model's, file's), in order.
    """

    name: str
    prefix: str
    body: str = "model"
    attention: str = "self_attn"
    layer: str = "DecoderLayer"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str = ""
    q_norm: str = ""
    k_norm: str = ""
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    parallel: bool = False
    head: str = "ForCausalLM"
    head_bias: bool = False
    head_settings: tuple[str, ...] = ()
    numbered: bool = True
    file_names: tuple[tuple[str, str], ...] = ()

    @property
    def model_type(self) -> str:
        """Of the mixture."""
        return f"attn_plugins_bam_{self.name}"

    @property
    def auto(self) -> str:
        """The Auto class that loads the model with its head."""
        return f"AutoModel{self.head}"

    @property
    def vision(self) -> bool:
        """It reads pictures: no cache, no tokenizer, and attention to all that is there."""
        return self.head == "ForImageClassification"

    def spellings(self, name: str) -> list[str]:
        """What a tensor of the dense model may be called in a file: as in the model, with old names, without the head's
        prefix."""
        old = name
        for ours, theirs in self.file_names:
            old = old.replace(ours, theirs)
        return [spelt for one in (name, old) for spelt in (one, one.removeprefix(f"{self.body}."))]

    def class_name(self, part: str) -> str:
        """Of the mixture: part is Config, Model, its head, ..."""
        return f"AttnPluginsBam{self.prefix}{part}"

    def dense_class(self, part: str) -> Any:
        """A class of transformers: Config, Model, Attention, or this architecture's layer or head."""
        kind = "configuration" if part == "Config" else "modeling"
        module = importlib.import_module(f"transformers.models.{self.name}.{kind}_{self.name}")
        return getattr(module, self.prefix + part)


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("llama", "Llama"),
        Architecture("qwen2", "Qwen2"),
        Architecture("qwen3", "Qwen3", q_norm="q_norm", k_norm="k_norm"),
        Architecture("mistral", "Mistral"),
        Architecture(
            "cohere", "Cohere", q_norm="q_norm", k_norm="k_norm", parallel=True,
            head_settings=("logit_scale", "tie_word_embeddings"),
        ),
        Architecture(
            "gpt_neox", "GPTNeoX", body="gpt_neox", attention="attention", layer="Layer", o="dense",
            fused="query_key_value", up=("dense_h_to_4h",), down="dense_4h_to_h", parallel=True,
            file_names=(("lm_head.weight", "embed_out.weight"),),
        ),
        Architecture(
            "phi", "Phi", o="dense", q_norm="q_layernorm", k_norm="k_layernorm", up=("fc1",), down="fc2", parallel=True,
            head_bias=True,
        ),
        Architecture(
            "vit", "ViT", body="vit", attention="attention", layer="Layer", up=("fc1",), down="fc2",
            head="ForImageClassification", numbered=False,
            file_names=(
                ("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
                ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
                ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ),
        ),
    )
}  # fmt: skip


def of(model_type: str) -> Architecture:
    """The architecture of a dense model or of a mixture.

    Raises:
        ValueError: none that BAM mixes.
    """
    found = ARCHITECTURES.get(model_type.removeprefix("attn_plugins_bam_"))
    if found is None:
        raise ValueError(f"model_type {model_type!r}: BAM mixes {', '.join(ARCHITECTURES)}")
    return found


def heads_of(config: Any) -> tuple[int, int, int]:
    """(query heads, KV heads, head size) of one expert's attention."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
