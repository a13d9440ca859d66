"""transformers' Trainer for models with routed heads: it adds the balance loss, and logs what the routers do."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from attn_plugins.training.routers import RouterWatch


class MoHTrainer(Trainer):
    """A `Trainer` of a model that is patched with "moh".

        handle = attn_plugins.patch(model, "moh", router="learned")
        MoHTrainer(model=model, handle=handle, args=arguments, train_dataset=rows).train()

    The balance loss has the same gradient whatever `gradient_accumulation_steps`, and under checkpointing of either
    kind. Each log has `balance`, `router_entropy` (means over the layers) and `dead_heads` (their sum) since the last.

    Args:
        handle: what `attn_plugins.patch` returned.
        balance: weight of the balance loss; the paper's is 0.01.
    """

    def __init__(self, *args: Any, handle: Any, balance: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = RouterWatch.of(handle, balance)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss, outputs = found
        if model.training:
            # a sum over the tokens of all accumulated batches is not divided by their number
            divided = num_items_in_batch is None or not self.model_accepts_loss_kwargs
            divided = divided and self.compute_loss_func is None
            parts = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
            loss = self.watch.joined(loss, 1.0 if divided else 1 / parts)  # an epoch's last step may have fewer
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        rows = self.watch.rows(self.accelerator.reduce if self.accelerator.num_processes > 1 else None)
        if rows and "loss" in logs:
            logs["balance"] = sum(row.balance for row in rows) / len(rows)
            logs["router_entropy"] = sum(row.entropy for row in rows) / len(rows)
            logs["dead_heads"] = sum(row.dead for row in rows)
            self.watch.reset()
        super().log(logs, *args, **kwargs)
