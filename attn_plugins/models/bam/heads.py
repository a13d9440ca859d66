"""Mixtures with a head, for text and for pictures, and how their routers' losses join the main one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attn_plugins.models.bam.architectures import Architecture
from attn_plugins.models.bam.routing import RoutingCall, real_tokens
from attn_plugins.models.bam.weights import BamWeights


class BamHead(BamWeights):
    """Before an architecture's model with its head.

    In training, the routers' losses (`BamFields`) have their gradients whenever `labels` are given: the loss that comes
    back is the main one alone. Who computes the loss from the logits passes it through `joined`.
    """

    architecture: Architecture
    body_class: Any
    _watched: bool = False  # `watching.watch_routers` wants to know the padding
    _last_call: RoutingCall | None = None

    def joined(self, loss: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """A loss made of the logits of the last call, as it is; its backward brings the routers' losses theirs.

        share: of an optimizer step that this backward is, where the loss is not divided by their number.
        """
        return loss if self._last_call is None else self._last_call.joined(loss, share)

    def _bare(self, config: Any) -> None:
        """An empty model of transformers with this config: the dense class's own `__init__` would make a dense body."""
        super(self.architecture.dense_class(self.architecture.head), self).__init__(config)

    def _with_losses(self, out: Any, call: RoutingCall, labels: Any, share: float | torch.Tensor) -> Any:
        """The output, whose loss brings the routers' losses their gradients."""
        if labels is None or not self.training:
            return out
        loss = call.joined(out[0], share)
        if isinstance(out, tuple):
            return (loss, *out[1:])
        out["loss"] = loss
        return out

    def _routing_call(self, tokens: torch.Tensor | None, attention_mask: Any) -> RoutingCall | None:
        """tokens (B, S, ...), where the mask may cover more than them; None: it covers the same."""
        config = self.config
        training = self.training and bool(config.router_aux_loss_coef or config.router_z_loss_coef)
        if not (training or self._watched):
            return None
        real = real_tokens(attention_mask, tokens)
        if not training:
            return RoutingCall(real)
        layers = config.num_hidden_layers
        balance, z = config.router_aux_loss_coef / layers, config.router_z_loss_coef / layers
        call = RoutingCall(real, balance, z, config.router_loss_over)
        if not torch.compiler.is_compiling():
            self._last_call = call
        return call


class BamForCausalLM(BamHead):
    """Before an architecture's causal language model. Of losses in training: see `BamHead`."""

    def __init__(self, config: Any) -> None:
        row = self.architecture
        self._bare(config)
        setattr(self, row.body, self.body_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=row.head_bias)
        for name in row.head_settings:
            setattr(self, name, getattr(config, name))
        self.post_init()  # type: ignore[operator]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the architecture's. `num_items_in_batch` (Trainer) divides the routers' losses as it does the main one."""
        call = self._routing_call(kwargs.get("inputs_embeds") if input_ids is None else input_ids, attention_mask)
        if call is None:
            return super().forward(input_ids, attention_mask, *args, **kwargs)  # type: ignore[misc]
        out = super().forward(input_ids, attention_mask, *args, routing=call, **kwargs)  # type: ignore[misc]
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        targets = labels[..., 1:] if shifted is None and labels is not None else shifted
        return self._with_losses(out, call, labels, _share(targets, kwargs))


class BamForImageClassification(BamHead):
    """Before an architecture's picture classifier: the class token goes through the experts like any other. Of losses
    in training: see `BamHead`.
    """

    def __init__(self, config: Any) -> None:
        self._bare(config)
        self.num_labels = config.num_labels
        setattr(self, self.architecture.body, self.body_class(config, add_pooling_layer=False))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()  # type: ignore[operator]

    def forward(
        self,
        pixel_values: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the architecture's."""
        call = self._routing_call(None, attention_mask)
        if call is not None:
            kwargs["routing"] = call
        out = super().forward(pixel_values, labels, interpolate_pos_encoding, attention_mask, **kwargs)  # type: ignore[misc]
        if call is None:
            return out
        divided = self.config.problem_type == "single_label_classification"  # transformers' other losses are means
        return self._with_losses(out, call, labels, _share(labels, kwargs) if divided else 1.0)


def _share(targets: torch.Tensor | None, kwargs: dict[str, Any]) -> float | torch.Tensor:
    """What part of the loss' divisor this call's targets are: 1 unless that counts several calls."""
    items = kwargs.get("num_items_in_batch")
    return 1.0 if items is None or targets is None else (targets != -100).sum() / items
