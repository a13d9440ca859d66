"""Masks as words: every bit where a kernel looks for it."""

import pytest
import torch

from attn_plugins.plan.bits import pack


@pytest.mark.parametrize("shape", [(1, 1, 3, 1), (2, 3, 5, 32), (1, 2, 4, 95)], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_bit_j_of_word_w_is_token_32_w_plus_j(shape, ordered, turned):
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=rng) < 0.5
    mask = mask.mT if turned else mask
    orders = [torch.randperm(length, generator=rng) if ordered else None for length in mask.shape[2:]]
    words = pack(mask, *orders)
    own, walked = (torch.arange(n) if order is None else order for n, order in zip(mask.shape[2:], orders, strict=True))
    assert words.dtype == torch.int32 and words.shape == (*mask.shape[:3], -(-mask.shape[3] // 32))
    at = torch.arange(mask.shape[3])
    assert torch.equal((words[..., at // 32] >> (at % 32)) & 1 != 0, mask[:, :, own][..., walked])
