"""Prompts as a pipeline's own text encoders see them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def check_encodes(pipe: Any, what: str, prompts: Sequence[str]) -> None:
    """Raise where `pipe` cannot encode. `what`: as the message calls the prompts.

    Raises:
        ValueError: no pipeline, or one without text encoder.
    """
    if not callable(getattr(pipe, "encode_prompt", None)):
        raise ValueError(
            f"{what} {list(prompts)} are encoded by the pipeline's text encoders: patch the pipeline, not its model"
        )
    parts = [any(getattr(pipe, name, None) is not None for name in names) for names in (_TOKENIZERS, _ENCODERS)]
    if not all(parts):
        raise ValueError(
            f"{type(pipe).__name__} has no tokenizer or text encoder (set free?): load them, to encode {list(prompts)}"
        )


def encode_prompts(pipe: Any, prompts: Sequence[str], max_sequence_length: int | None = None) -> torch.Tensor:
    """(P, L, C) by `pipe.encode_prompt`: what the pipeline would hand to its denoiser for each prompt alone.

    max_sequence_length: tokens, of pipelines that can be told; None: the default of the pipeline's call.

    Raises:
        ValueError: a length, of a pipeline that cannot be told.
    """
    takes = inspect.signature(pipe.encode_prompt).parameters
    if max_sequence_length is not None and "max_sequence_length" not in takes:
        raise ValueError(
            f"max_sequence_length={max_sequence_length}: {type(pipe).__name__} has prompts of one length, leave it out"
        )
    usual = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    if max_sequence_length is None and usual is not None and isinstance(usual.default, int):
        max_sequence_length = usual.default
    given = {
        "prompt": list(prompts), "prompt_2": None, "prompt_3": None, "device": pipe._execution_device,
        "num_images_per_prompt": 1, "num_videos_per_prompt": 1, "do_classifier_free_guidance": False,
    }  # fmt: skip
    if max_sequence_length is not None:
        given["max_sequence_length"] = max_sequence_length
    with torch.no_grad():
        found = pipe.encode_prompt(**{name: value for name, value in given.items() if name in takes})[0]
    return found.detach()
