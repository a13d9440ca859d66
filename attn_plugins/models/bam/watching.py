"""Statistics of a mixture's routers, layer by layer."""

from __future__ import annotations

from typing import Any

from attn_plugins.models.bam.attention import ExpertOutput
from attn_plugins.models.bam.feed_forward import BamFeedForward
from attn_plugins.training.routers import LayerWatch, RouterWatch


class BamWatch(RouterWatch):
    """A RouterWatch of a mixture: rows of its feed-forwards (tokens that each expert was given) and of its attentions
    (the mean of each expert's gates). Padding is left out wherever the model was given an attention mask.

        watch = watch_routers(model)
        model(**batch)
        print("\n".join(table(watch.rows())))      # training.routers.table
        watch.close()
    """

    def __init__(self, model: Any) -> None:
        super().__init__(weight=0.0)  # the losses are the model's own
        self.models = [module for module in model.modules() if hasattr(module, "_routing_call")]
        for mixture in self.models:
            mixture._watched = True
        for name, module in model.named_modules():
            if isinstance(module, BamFeedForward | ExpertOutput):
                self.layers.append(LayerWatch(self, name.removesuffix(".mix")))
                module.watch = self.layers[-1]
                self._held.append(module)

    def close(self) -> None:
        super().close()
        self.layers.clear()
        for mixture in self.models:
            mixture._watched = False


def watch_routers(model: Any) -> BamWatch:
    """Watch until `close`. Calls add up, until `reset`.

    Args:
        model: a mixture, wrapped or not.

    Raises:
        ValueError: a model without routers.
    """
    watch = BamWatch(model)
    if not watch.layers:
        raise ValueError(f"{type(model).__name__} has no routers of BAM: give a mixture (attn-plugins upcycle)")
    return watch
