"""Routers that know their experts' prompts before training (`router_init: hidden`).

The row of an expert is the mean, over the tokens of its prompts, of what the base model gives that router's place as
input, less the mean over experts, at length 1: so an input like its prompts' scores highest, and what all have in
common (in a language model, most of a hidden state) scores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attn_plugins.models.bam import Architecture


@torch.inference_mode()
def rows_of_prompts(
    model: Any, tokenizer: Any, row: Architecture, prompts: Sequence[Sequence[str]], routers: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Rows for each router of the mixture, (N, C) float32.

    Args:
        model: the dense base model; prompts: of each expert, one text or more.
        routers: the names of the mixture's router weights.

    Raises:
        ValueError: a prompt without a token.
    """
    places = {}  # module of the dense model -> name of the router that stands there
    for name in routers:
        place = name.removesuffix(".router.weight").removesuffix(".mix")
        places[place] = name
    sums = {name: torch.zeros(len(prompts), model.config.hidden_size, dtype=torch.float64) for name in places.values()}
    expert = 0

    def see(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            sums[name][expert] += x[0].double().sum(0).cpu()

        return hook

    hooks = [
        module.register_forward_pre_hook(see(places[place]), with_kwargs=True)
        for place, module in model.named_modules()
        if place in places
    ]
    try:
        for expert, texts in enumerate(prompts):  # noqa: B007  # the hooks read it
            tokens = 0
            for text in texts:
                ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
                tokens += ids.shape[1]
                if ids.shape[1]:
                    model(ids, use_cache=False)
            if not tokens:
                raise ValueError(f"positive_prompts of expert {expert} have no token: {list(texts)!r}")
            for total in sums.values():
                total[expert] /= tokens
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, means in sums.items():
        own = means - means.mean(0)
        found[name] = (own / own.norm(dim=-1, keepdim=True).clamp(min=1e-12)).float()
    return found
