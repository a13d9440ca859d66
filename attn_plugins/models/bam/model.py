"""The classes of mixtures, made from an architecture's own: its attention, layer, body and causal language model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import initialization

from attn_plugins.models.bam.architectures import Architecture
from attn_plugins.models.bam.attention import BamAttention, ExpertOutput
from attn_plugins.models.bam.config import HOME, config_class
from attn_plugins.models.bam.feed_forward import BamExperts, BamFeedForward
from attn_plugins.models.bam.neox import SharedNeoXAttention
from attn_plugins.models.bam.router import BamRouter
from attn_plugins.models.bam.routing import RoutingCall, real_tokens, running


class BamLayer(nn.Module):
    """Before an architecture's layer: what is in it reads the call that it runs in."""

    def forward(self, *args: Any, routing: RoutingCall | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with running(routing):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class BamWeights(nn.Module):
    """Before both kinds of models: the new weights' start, and what their experts run on."""

    config: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        std = self.config.initializer_range
        if isinstance(module, BamRouter):
            initialization.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BamExperts):
            for name, weight in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    initialization.zeros_(weight)
                else:
                    initialization.normal_(weight, mean=0.0, std=std)
        elif isinstance(module, ExpertOutput) and module.bias is not None:
            initialization.zeros_(module.bias)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for a decorator in the source; it stands in feed_forward.py


class BamBody(BamWeights):
    """Before an architecture's model without a head."""

    architecture: Architecture

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        row = self.architecture
        attention, layer_class = part_class(row, "Attention"), part_class(row, row.layer)
        for index, layer in enumerate(self.layers):  # type: ignore[arg-type]
            if config.attention_experts != "mean":
                setattr(layer, row.attention, attention(config, index))
            layer.mlp = BamFeedForward(config, row, layer.mlp)
            layer.__class__ = layer_class  # its forward is kept, and with it the order of the block
        self.post_init()  # type: ignore[operator]


class BamForCausalLM(BamWeights):
    """Before an architecture's causal language model.

    In training, the routers' losses (`BamFields`) have their gradients whenever `labels` are given: the loss that comes
    back is the NLL alone. Who computes the loss from the logits passes it through `joined`.
    """

    architecture: Architecture
    _watched: bool = False  # `watching.watch_routers` wants to know the padding
    _last_call: RoutingCall | None = None

    def __init__(self, config: Any) -> None:
        row = self.architecture
        super(row.dense_class("ForCausalLM"), self).__init__(config)  # not its own: that would make a dense body
        setattr(self, row.body, part_class(row, "Model")(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=row.head_bias)
        for name in row.head_settings:
            setattr(self, name, getattr(config, name))
        self.post_init()  # type: ignore[operator]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the architecture's. `num_items_in_batch` (Trainer) divides the routers' losses as it does the main one."""
        call = self._routing_call(input_ids, attention_mask, kwargs)
        if call is None:
            return super().forward(input_ids, attention_mask, *args, **kwargs)  # type: ignore[misc]
        out = super().forward(input_ids, attention_mask, *args, routing=call, **kwargs)  # type: ignore[misc]
        labels = kwargs.get("labels")
        if labels is None or not self.training:
            return out
        loss = call.joined(out[0], _share(labels, kwargs))
        if isinstance(out, tuple):
            return (loss, *out[1:])
        out["loss"] = loss
        return out

    def joined(self, loss: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """A loss made of the logits of the last call, as it is; its backward brings the routers' losses theirs.

        share: of an optimizer step that this backward is, where the loss is not divided by their number.
        """
        return loss if self._last_call is None else self._last_call.joined(loss, share)

    def _routing_call(self, input_ids: Any, attention_mask: Any, kwargs: dict[str, Any]) -> RoutingCall | None:
        config = self.config
        training = self.training and bool(config.router_aux_loss_coef or config.router_z_loss_coef)
        if not (training or self._watched):
            return None
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        real = real_tokens(attention_mask, tokens)
        if not training:
            return RoutingCall(real)
        layers = config.num_hidden_layers
        balance, z = config.router_aux_loss_coef / layers, config.router_z_loss_coef / layers
        call = RoutingCall(real, balance, z, config.router_loss_over)
        if not torch.compiler.is_compiling():
            self._last_call = call
        return call


def _share(labels: torch.Tensor, kwargs: dict[str, Any]) -> float | torch.Tensor:
    """What part of the loss' divisor this call's targets are: 1 unless that counts several calls."""
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = kwargs.get("shift_labels")
    targets = labels[..., 1:] if shifted is None else shifted
    return (targets != -100).sum() / items


@functools.cache
def part_class(row: Architecture, part: str) -> Any:
    """A class of mixtures of this architecture: Attention, its layer, Model, ForCausalLM; the same one every time."""
    attention = SharedNeoXAttention if row.fused else BamAttention
    kinds = {"Attention": attention, row.layer: BamLayer, "Model": BamBody, "ForCausalLM": BamForCausalLM}
    ours, dense = kinds[part], row.dense_class(part)
    body: dict[str, Any] = {"__module__": HOME, "__doc__": ours.__doc__, "architecture": row}
    if part in ("Model", "ForCausalLM"):
        body |= {"config_class": config_class(row), "_no_split_modules": [row.class_name(row.layer)]}
        # So that saving writes the file that loads it anywhere (`config.HOME`).
        body |= {"_auto_class": "AutoModel" if part == "Model" else "AutoModelForCausalLM"}
    if part == "ForCausalLM":
        body["forward"] = _signed(BamForCausalLM.forward, dense.forward)
    return type(row.class_name(part), (ours, dense), body)


def _signed(ours: Any, dense: Any) -> Any:
    """Our forward under the dense one's signature: Trainer and `generate` read from it what a model takes."""

    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return forward
