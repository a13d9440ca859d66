"""The embedded language model: a Llama of 3.7M parameters that transformers loads as any other, with no download.

    model, tokenizer = small_llama()
    prompt = tokenizer("\nname state: 4719\n\nvalue line: 2280\n\nname state:", return_tensors="pt")
    tokenizer.decode(model.generate(**prompt, max_new_tokens=5)[0])

It knows Python's own texts and how to find a value by its key in up to 4,096 tokens;
`attn_plugins.training.small_llama` has both as data, with what was held out.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def asset_folder() -> Path:
    """Where model and tokenizer lie: a folder that `AutoModelForCausalLM.from_pretrained` reads."""
    return Path(str(importlib.resources.files("attn_plugins") / "assets" / "small_llama"))


def small_llama(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The embedded model, on the CPU, in evaluation mode, and its tokenizer. dtype: of the weights (stored as fp16)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asset_folder(), dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(asset_folder(), local_files_only=True)
