"""MoBA: its choice against the paper's words, and language models in prefill and behind a cache."""

import copy

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall, CausalKeys
from attn_plugins.methods.moba import MoBA, MoBAConfig
from attn_plugins.ops.vmoba.causal import causal_block_attention
from attn_plugins.sequence import Sequence


def brute_force_mask(q, k, block, k_blocks):
    """(B, H, N, N): a query's own block up to itself, and the best earlier ones by the mean of their keys."""
    tokens = q.shape[2]
    means = torch.stack([part.mean(2) for part in k.split(block, dim=2)], dim=2)
    scores = (q @ means.transpose(-1, -2)).tolist()
    mask = torch.zeros(*q.shape[:2], tokens, tokens, dtype=torch.bool)
    for b, item in enumerate(scores):
        for h, head in enumerate(item):
            for i, row in enumerate(head):
                best = sorted(range(i // block), key=lambda j, row=row: -row[j])[: k_blocks - 1]
                for j in (i // block, *best):
                    mask[b, h, i, j * block : min((j + 1) * block, i + 1)] = True
    return mask


def tensors(tokens, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, tokens, 8, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for h in (4, 2, 2)
    ]


@pytest.mark.parametrize(("block", "k_blocks"), [(8, 1), (8, 2), (8, 3), (5, 4), (16, 2), (100, 3), (1, 6), (3, 99)])
def test_it_is_what_the_paper_says(block, k_blocks):
    q, k, v = tensors(37)
    wide = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    mask = brute_force_mask(q.detach(), wide[0].detach(), block, k_blocks)
    want = F.scaled_dot_product_attention(q, *wide, mask, scale=0.3)
    found = causal_block_attention(q, k, v, block=block, k_blocks=k_blocks, scale=0.3)
    upstream = torch.randn_like(want)
    grads = [torch.autograd.grad(out, (q, k, v), upstream) for out in (found, want)]
    for one, other in zip([found, *grads[0]], [want, *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_graph():
    torch._dynamo.reset()
    q, k, v = tensors(37)
    compiled = torch.compile(causal_block_attention, fullgraph=True, backend="aot_eager")
    found, want = (f(q, k, v, block=8, k_blocks=2) for f in (compiled, causal_block_attention))
    assert torch.equal(found, want)
    torch._dynamo.reset()


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="block=0"):
        causal_block_attention(*tensors(9), block=0, k_blocks=2)
    with pytest.raises(ValueError, match="k_blocks=0"):
        MoBAConfig(k_blocks=0)


def test_what_it_refuses_and_its_density():
    processor = MoBA().processor(MoBAConfig(block=8, k_blocks=2), 0, 1)
    q, k, v = tensors(37)
    assert processor.refuses(AttentionCall(q, k, v, "causal", causal=True)) is None
    assert processor.refuses(AttentionCall(q, k, v, "causal", causal=False))
    keys = CausalKeys(torch.zeros(2, 37), torch.zeros(2), torch.zeros(1))
    assert processor.refuses(AttentionCall(q, k, v, "causal", causal=True, keys=keys))
    assert processor.refuses(AttentionCall(q, k, v, "causal", causal=True, sliding_window=8))
    mask = brute_force_mask(q.detach(), k.detach().repeat_interleave(2, dim=1), 8, 2)
    shown = float(mask[0, 0].sum()) / (37 * 38 / 2)
    assert processor.density(Sequence((37,))) == pytest.approx(shown)


@pytest.fixture
def llama():
    pytest.importorskip("transformers")
    from tests.support.tiny_language import tiny

    return tiny()


def test_a_language_model_in_prefill_and_behind_a_cache(llama):
    import attn_plugins

    ids = torch.randint(3, 64, (2, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = llama(ids).logits
        handle = attn_plugins.patch(llama, "moba", block=4, k_blocks=2)
        sparse = llama(ids, use_cache=True)
        assert not torch.allclose(sparse.logits, dense)
        torch.testing.assert_close(sparse.logits[:, :8], dense[:, :8])  # two blocks: all that there is
        step = llama(ids[:, :1], past_key_values=sparse.past_key_values).logits
        assert step.isfinite().all()
        handle.remove()
        assert torch.equal(llama(ids).logits, dense)


def test_dense_where_everything_is_seen(llama):
    import attn_plugins

    ids = torch.randint(3, 64, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(llama).double()(ids).logits
        allowed = 2 * (llama(ids).logits - exact).abs().max()
        attn_plugins.patch(llama, "moba")
        assert (llama(ids).logits - exact).abs().max() <= allowed
        first = llama(ids[:, :20], use_cache=True)
        behind = llama(ids[:, 20:], past_key_values=first.past_key_values).logits  # a chunk behind a cache
        assert (behind - exact[:, 20:]).abs().max() <= allowed
