"""What a ring cache's `update` hands to the attention function in place of all keys: new ones, and who keeps them."""

from __future__ import annotations

from typing import Any

import torch


class Pending:
    """New keys or values (B, H_kv, n, D) that `layer` has not yet taken in.

    Attention comes first, for they may take the places of what it still has to see.
    """

    def __init__(self, tensor: torch.Tensor, layer: Any) -> None:
        self.tensor = tensor
        self.layer = layer
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.device = tensor.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(STRAY)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(STRAY)


STRAY = (
    "this cache keeps a part of the keys only, for the model and the patch that it was made by: give this model "
    "another one (past_key_values=None makes it), or patch it as it was"
)
