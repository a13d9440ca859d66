"""Another attention in all layers of a causal transformers model for as long as a `with` lasts, and its gradients.

For measuring and searching, on whole sequences without a cache. Nothing is left behind: the names stand in
transformers' two tables while the `with` lasts, and every config has its own implementation again afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# (layer, q (B, H, N, D), k, v (B, H_kv, N, D), scale of the scores) -> (B, H, N, D)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
# (layer, q, k, v, gradient of the loss by attention's output (B, H, N, D), scale): detached
Take = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], None]

_NUMBER = itertools.count()  # two probes at a time have two names
# keyword arguments that make attention more than softmax(q k) v
_MEANINGFUL = {"softcap": "caps its scores", "s_aux": "has learned sinks", "position_bias": "adds a bias to its scores"}


@contextlib.contextmanager
def replaced_attention(model: Any, attend: Attend) -> Iterator[None]:
    """Run `attend` instead of every attention of `model`: causal, whole sequences, no padding, no cache.

    Args:
        model: a causal language model of transformers, of any dtype and device.
        attend: gets q, k, v after norm and rotation, and the number of the layer.

    Raises:
        TypeError: a model whose attention does not go through transformers' AttentionInterface.
        ValueError: in the forward: an attention that is more than causal softmax attention (softcap, learned sinks, a
            sliding window shorter than the sequence), padding, a cache, dropout; or a forward that never came here.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        raise TypeError(f"{type(model).__name__} does not route its attention through transformers' AttentionInterface")
    name = f"attn_plugins_probe_{next(_NUMBER)}"
    before = [(config, config._attn_implementation) for config in _configs(model)]
    tables = (AttentionInterface, AttentionMaskInterface)
    try:
        AttentionInterface.register(name, _function(attend))
        AttentionMaskInterface.register(name, _no_mask)
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for table in tables:
            table._global_mapping.pop(name, None)


def output_gradients(
    model: Any, ids: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], take: Take
) -> tuple[float, int]:
    """One dense forward and backward: hand the gradient by each attention's output to `take`, last layer first.

    Only the path from the loss to the first attention is computed: no weight gets a gradient, and none is changed.

    Args:
        ids: (B, N) int64 on the model's device, without padding.
        loss: makes a scalar of the logits (B, N, vocabulary).

    Returns:
        The loss, and how many layers were taken.

    Raises:
        ValueError, TypeError: as `replaced_attention`; or a model whose attention was never asked.
    """
    outputs: list[torch.Tensor] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        out = dense_attention(layer, q, k, v, scale)
        if not out.requires_grad:
            out.requires_grad_()
        out.register_hook(lambda grad: take(layer, q.detach(), k.detach(), v.detach(), grad, scale))
        outputs.append(out)
        return out

    with torch.enable_grad(), replaced_attention(model, attend):
        value = loss(model(ids, use_cache=False).logits)
        if not outputs:
            raise ValueError(f"{type(model).__name__} never asked for attention here: is it patched? unpatch it first")
        torch.autograd.grad(value, outputs[0])
    return float(value.detach()), len(outputs)


def dense_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """An `Attend`: causal SDPA; the keys of a group are repeated, as no CPU kernel of PyTorch groups them."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v)) if repeats > 1 else (k, v)
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _function(attend: Attend) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        reason = _refusal(module, query, key, attention_mask, dropout, is_causal, kwargs)
        if reason is not None:
            raise ValueError(f"{type(module).__name__} {reason}: only plain causal attention can be probed")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        return attend(int(module.layer_idx), query, key, value, scale).transpose(1, 2), None  # type: ignore[arg-type]

    return forward


def _refusal(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, dropout: float, is_causal: bool | None,
    kwargs: dict[str, Any],
) -> str | None:  # fmt: skip
    for name, what in _MEANINGFUL.items():
        if kwargs.get(name) is not None:
            return what
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        return f"has a sliding window of {window} tokens, and there are {key.shape[2]}"
    if mask is not None or query.shape[2] != key.shape[2]:
        return f"got a mask, or {query.shape[2]} queries beside {key.shape[2]} keys"
    if dropout:
        return f"has a dropout of {dropout} (model.eval() turns it off)"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or not hasattr(module, "layer_idx"):
        return "is not causal self-attention of a numbered layer"
    return None


def _no_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:  # fmt: skip
    """For transformers' AttentionMaskInterface: causality is the function's own, and there is nothing else."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("padding in the attention mask: only plain causal attention can be probed")
    if kwargs.get("use_vmap"):
        raise ValueError("a mask of the model's own making: only plain causal attention can be probed")


def _configs(model: Any) -> list[Any]:
    """Every config that names an attention implementation: of the model, its parts, and theirs in turn."""
    found: dict[int, Any] = {}
    waiting = [module.__dict__.get("config") for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())
