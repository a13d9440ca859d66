"""`vmoba_attention` against the choice written from the paper, in float64, and what must hold of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import merge_attention_states, vmoba_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens
from attn_plugins.ops.vmoba.layout import decode, encode, fit_tile
from attn_plugins.ops.vmoba.lists import attend_lists
from attn_plugins.ops.vmoba.selection import Selection
from attn_plugins.sequence import Sequence
from tests.support.chosen import random_problem

FORMS = [pytest.param(False, id="pooled"), pytest.param(True, id="exact")]
RULES = [("topk", {"k_blocks": 3}), ("threshold", {"tau": 0.4}), ("top_p", {"tau": 0.6})]


def results(problem, attend):
    """out, lse and the gradients of q, k, v, under fixed gradients of out and lse."""
    tensors = [t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    out, lse = attend(*tensors)
    rng = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    lse = torch.where(lse.isfinite(), lse, 0.0)
    return [out, lse, *torch.autograd.grad((out, lse), tensors, upstream)]


def ours(problem, **changed):
    return results(problem, lambda *qkv: vmoba_attention(*qkv, **{**problem.options, **changed}, return_lse=True))


def qkv(tokens, batch=1, heads=2, dtype=torch.float64, size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, size, generator=rng, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("seed", range(120))
def test_it_is_what_the_paper_says(seed):
    problem = random_problem(seed)
    mask = problem.mask()
    exact = results(problem, lambda *qkv: masked_attention(*qkv, mask, 8**-0.5))
    for backend in ("cpu", "reference"):
        for name, found, want in zip(
            ("out", "lse", "dq", "dk", "dv"), ours(problem, backend=backend), exact, strict=True
        ):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {problem}\n{m}")


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize("scope", ["query", "head"])
@pytest.mark.parametrize(("rule", "number"), RULES)
def test_prime_grids_in_every_rule_and_scope(rule, number, scope, exact):
    q, k, v = qkv(7 * 13 * 17, heads=1)
    options = {"grid": (7, 13, 17), "block": (3, 5, 6), "rule": rule, "scope": scope, "exact": exact, **number}
    found = vmoba_attention(q, k, v, **options, return_lse=True)
    want = vmoba_attention(q, k, v, **options, return_lse=True, backend="reference")
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert not torch.allclose(found[0], F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": rule, "scope": scope, "tau": tau}
        for rule in ("threshold", "top_p")
        for scope in ("query", "head")
        for tau in (1, 1.5)
    ]
    + [{"k_blocks": 12}, {"k_blocks": 99, "scope": "head"}, {"k_blocks": 1, "min_blocks": 12}],
    ids=str,
)  # fmt: skip
def test_all_blocks_are_dense_attention(options, text, exact):
    q, k, v = qkv(60 + text)
    out = vmoba_attention(q, k, v, grid=(5, 12), block=(2, 3), exact=exact, text_after=text, **options)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize(
    "options", [{"k_blocks": 1}, {"k_blocks": 1, "scope": "head"}, {"rule": "threshold", "tau": 0}]
)
def test_one_block_is_block_diagonal(options, exact):
    q, k, v = qkv(60)
    out = vmoba_attention(q, k, v, grid=(60,), block=(16,), exact=exact, **options)
    each = [F.scaled_dot_product_attention(*(t[:, :, at : at + 16] for t in (q, k, v))) for at in range(0, 60, 16)]
    torch.testing.assert_close(out, torch.cat(each, dim=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact", FORMS)
def test_a_block_longer_than_everything_is_dense_attention(exact):
    q, k, v = qkv(30)
    out = vmoba_attention(q, k, v, grid=(5, 6), block=(100, 100), k_blocks=1, exact=exact)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_a_batch_gives_what_its_items_give_alone_bit_by_bit(seed, dtype):
    problem = random_problem(seed, dtype)
    options = {**problem.options, "return_lse": True}
    whole = vmoba_attention(problem.q, problem.k, problem.v, **options)
    for b in range(len(problem.q)):
        texts = {side: options[side] for side in ("text_before", "text_after")}
        one = {side: text if isinstance(text, int) else text[b : b + 1] for side, text in texts.items()}
        alone = vmoba_attention(*(t[b : b + 1] for t in (problem.q, problem.k, problem.v)), **{**options, **one})
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(whole, alone, strict=True)), problem


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state(seed):
    problem = random_problem(seed, torch.float32)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(ours(problem), ours(problem), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize("text", [1, 512, [[512, 1], [512, 512]], [[7, 0], [7, 3]]], ids=str)
def test_text_of_any_length(text, exact):
    length = text if isinstance(text, int) else text[0][0]
    q, k, v = qkv(48 + length, batch=2)
    options = {"grid": (6, 8), "block": (3, 4), "k_blocks": 2, "text_after": text, "exact": exact, "return_lse": True}
    found = vmoba_attention(q, k, v, **options)
    torch.testing.assert_close(found, vmoba_attention(q, k, v, **options, backend="reference"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact", FORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_never_leaks(poison, exact):
    q, k, v = qkv(30 + 4, batch=2)
    padding = torch.zeros(2, 1, 34, 1, dtype=torch.bool)
    padding[0, :, 31:] = padding[1, :, 33:] = True
    options = {"grid": (5, 6), "block": (2, 3), "k_blocks": 2, "text_after": [[4, 1], [4, 3]], "exact": exact}
    clean, found = (
        vmoba_attention(*(t.masked_fill(padding, value) for t in (q, k, v)), **options) for value in (0.0, poison)
    )
    assert torch.equal(clean, found) and (found.masked_select(padding) == 0).all()


def test_merging_disjoint_lists_is_their_union():
    q, k, v = qkv(64, batch=2)
    spec = encode(Sequence((64,)), (8,), (4,))
    scores = torch.rand(2, 2, 16, 8).argsort(-1).int()
    count = torch.full((2, 2, 16), 5, dtype=torch.int32)
    parts = [attend_lists(q, k, v, lists, count[:, :, :] * 0 + n, 0.3, spec, "cpu")
             for lists, n in ((scores[..., :2], 2), (scores[..., 2:5], 3))]  # fmt: skip
    union = attend_lists(q, k, v, scores[..., :5].contiguous(), count, 0.3, spec, "cpu")
    torch.testing.assert_close(merge_attention_states(*zip(*parts, strict=True)), union, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tau", "published"), [(0.15, 0.13), (0.25, 0.19), (0.35, 0.27), (0.5, 0.39)])
def test_density_of_the_thresholds(tau, published):
    """On random q and k, the mean of both scopes, 24 blocks: within a tenth of the published, and .015."""
    q, k, _ = qkv(24 * 64, dtype=torch.float32, size=64)
    spec = encode(Sequence((24 * 64,)), (64,), (64,))
    shares = [
        float(choose_for_tokens(q, k, spec, Selection("threshold", scope, tau=tau), 0.125).float().mean())
        for scope in ("query", "head")
    ]
    assert abs(sum(shares) / 2 - published) < 0.1 * published + 0.015


def test_tiles_of_one_token_choose_as_tokens_do():
    q, k, v = qkv(60)
    for rule, number in RULES:
        for scope in ("query", "head"):
            options = {"grid": (5, 12), "block": (2, 3), "rule": rule, "scope": scope, **number}
            exact = vmoba_attention(q, k, v, **options, exact=True)
            torch.testing.assert_close(vmoba_attention(q, k, v, **options, tile=1), exact, rtol=0, atol=1e-12)


def test_equal_scores_count_equally():
    """Queries and keys that are all alike: every pair weighs as much, and tau .5 keeps half of them."""
    q = k = torch.ones(1, 2, 64, 8)
    for scope in ("query", "head"):
        spec = encode(Sequence((64,)), (8,), (8,))
        for rule in ("threshold", "top_p"):
            _, count = choose_for_tiles(q, k, spec, Selection(rule, scope, tau=0.5), 1.0)
            assert float(count.double().mean()) == 4.0, (scope, rule)
        lists, _ = choose_for_tiles(q, k, spec, Selection(k_blocks=3), 1.0)
        assert lists[0, 0, 5].tolist() == [5, 0, 1]  # its own, then ties by number


def test_head_scope_ranks_k_times_the_queries():
    q, k, _ = qkv(96, batch=2)
    spec = encode(Sequence((96,)), (8,), (8,))
    seen = choose_for_tokens(q, k, spec, Selection(scope="head", k_blocks=4), 1.0)
    assert (seen.sum((-2, -1)) == 4 * 96).all() and len(set(seen.sum(-1).flatten().tolist())) > 2


def test_the_choice_has_no_gradient_and_outputs_keep_q_layout():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in qkv(60))
    for exact in (False, True):
        out = vmoba_attention(q, k, v, grid=60, block=7, k_blocks=2, exact=exact)
        assert out.stride() == q.stride()
        for grad, t in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
            assert grad.stride() == t.stride()


def test_tiles_lie_within_blocks_and_do_not_exceed_what_they_may():
    for most in (1, 5, 17, 128, 100000):
        for block in ((3, 30, 52), (7,), (1, 1, 1), (13, 17)):
            tile = fit_tile(block, most)
            assert math.prod(tile) <= most and all(t <= b for t, b in zip(tile, block, strict=True))
    one = decode(encode(Sequence((7, 13), 2, 3), (3, 5), (2, 2)))[0][1]
    order = torch.from_numpy(one.tiles.order) - 2
    block_of = torch.tensor([(t // 13 // 3) * 3 + t % 13 // 5 for t in range(91)])
    assert torch.equal(order.sort().values, torch.arange(91))
    assert torch.equal(one.own[one.tile_of], block_of)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "k_blocks=None"),
        ({"k_blocks": 0}, "k_blocks=0"),
        ({"rule": "best"}, "rule='best': legal are topk, threshold, top_p"),
        ({"scope": "batch", "k_blocks": 1}, "scope='batch': legal are query, head"),
        ({"rule": "threshold"}, "tau=None"),
        ({"rule": "threshold", "tau": -0.1}, "tau=-0.1"),
        ({"k_blocks": 2, "min_blocks": 0}, "min_blocks=0"),
        ({"k_blocks": 2, "min_blocks": 3, "max_blocks": 2}, "max_blocks=2"),
        ({"k_blocks": 2, "block": (0, 1)}, "block="),
        ({"k_blocks": 2, "block": (2, 2, 2)}, "3 sizes for the 2 axes"),
        ({"k_blocks": 2, "tile": 0}, "tile=0"),
        ({"k_blocks": 2, "tile": (1, 1, 1)}, "tile="),
        ({"k_blocks": 2, "grid": (5, 7)}, "makes 35"),
        ({"k_blocks": 2, "exact": True, "backend": "triton"}, "the kernels compute in float16"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        vmoba_attention(*qkv(30), **{"grid": (5, 6), "block": (2, 3), **options})
