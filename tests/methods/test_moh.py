"""MoH by its formulas: gates, scores, budgets, routers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from attn_plugins.method import SiteShape
from attn_plugins.methods.moh import HeadRouter, MoH, MoHConfig
from attn_plugins.methods.moh.budgets import allotted
from attn_plugins.methods.moh.config import Budget
from attn_plugins.methods.moh.gates import choose, hard, in_heads, query_norms, two_stage
from tests.support.tiny import randn

WIDTH = 12


def router(kind: str = "learned", units: int = 8, shared: int = 2, routed: int = 3, **more: Any) -> HeadRouter:
    return HeadRouter(kind, WIDTH, Budget(units, shared, routed, more.pop("group", 1)), **more)


def authors(r: HeadRouter, x: torch.Tensor, paper: bool) -> torch.Tensor:
    """The authors' code (paper=False) and equations 5 and 6 (paper=True), in float64."""
    budget, x = r.budget, x.double()
    p = (x @ r.w_r.weight.double().T).softmax(-1)
    top = p.topk(budget.routed, dim=-1).indices
    mask = torch.zeros_like(p).scatter(-1, top, 1.0)
    g_routed = p * mask if paper else budget.routed * p * mask / (p * mask).sum(-1, keepdim=True)
    g_shared = (x @ r.w_s.weight.double().T).softmax(-1) if budget.shared > 1 else torch.ones_like(p[..., :1])
    a_b = (x @ r.w_h.weight.double().T).softmax(-1)
    if not paper:
        g_shared, a_b = budget.shared * g_shared, 2 * a_b
    return torch.cat([a_b[..., :1] * g_shared, a_b[..., 1:] * g_routed], dim=-1)


def filled(r: HeadRouter) -> HeadRouter:
    for seed, parameter in enumerate(r.parameters()):
        parameter.data = 0.5 * randn(*parameter.shape, seed=seed)
    return r


@pytest.mark.parametrize("scale", ["code", "paper"])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_learned_gates_are_the_authors(scale: str, shared: int) -> None:
    r, x = filled(router(shared=shared, scale=scale)), randn(2, 9, WIDTH)
    found = r(x)
    torch.testing.assert_close(found.gates.double(), authors(r, x, scale == "paper"), rtol=1e-5, atol=1e-6)
    total = found.gates.sum(-1)
    if scale == "paper":
        assert (total <= 1 + 1e-6).all()
    else:  # a * h_s + b * K, where a + b = 2: with as many shared heads as chosen ones, it is their number
        kinds = 2 * (x @ r.w_h.weight.T).softmax(-1)
        torch.testing.assert_close(total, kinds[..., 0] * shared + kinds[..., 1] * 3)
    torch.testing.assert_close(found.share.sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("kind", ["learned", "ridge"])
def test_exactly_k_a_token_whatever_the_scores(kind: str) -> None:
    r = filled(router(kind))
    for x in (randn(2, 50, WIDTH), torch.zeros(1, 3, WIDTH), 1e4 * randn(1, 50, WIDTH)):
        found = r(x)
        assert (found.chosen.sum(-1) == 3).all()
        if kind == "ridge":
            assert ((found.gates != 0).sum(-1) == 5).all()


def test_of_equal_scores_the_first_are_chosen() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    want = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(choose(scores, 2), want) and torch.equal(choose(scores, torch.tensor(2)), want)


@pytest.mark.parametrize("units", range(2, 14))
def test_all_heads_and_zero_routers_are_exactly_one(units: int) -> None:
    for shared in range(units):
        r = router(units=units, shared=shared, routed=units - shared)
        r.w_r.weight.data.zero_()
        assert torch.equal(r(randn(1, 5, WIDTH)).gates, torch.ones(1, 5, units))


def test_new_routers_choose_something_and_stay_near_one() -> None:
    before = torch.get_rng_state()
    r = router()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(router(seed=1).w_r.weight, r.w_r.weight) and torch.equal(router().w_r.weight, r.w_r.weight)
    found = r(randn(2, 64, WIDTH))
    on = found.gates[found.gates != 0]
    assert ((on - 1).abs() < 0.2).all() and r.w_r.weight.abs().min() > 0
    assert found.chosen.double().mean((0, 1)).min() > 0  # no unit is out from the start


def test_rows_that_are_not_chosen_get_no_gradient_of_the_task() -> None:
    r = filled(router())
    x = randn(1, 1, WIDTH)
    found = r(x)
    (found.gates * randn(1, 1, 8, seed=5)).sum().backward()
    on = found.chosen[0, 0]
    assert (r.w_r.weight.grad[on].abs().amax(1) > 0).all() and not r.w_r.weight.grad[~on].any()
    assert r.w_s.weight.grad.abs().max() > 0 and r.w_h.weight.grad.abs().max() > 0
    r.zero_grad()
    r(x).share[0, 0, ~on].sum().backward()  # the balance loss reaches all
    assert (r.w_r.weight.grad.abs().amax(1) > 0).all()


def test_gates_go_to_the_heads_that_the_buffer_names() -> None:
    r = filled(router())
    x = randn(1, 4, WIDTH)
    plain = r(x).gates
    r.units.copy_(torch.tensor([5, 1, 0, 7, 2, 3, 4, 6]))
    assert torch.equal(r(x).gates[..., r.units], plain)
    grouped = in_heads(plain, r.units, 3)
    assert grouped.shape[-1] == 24 and torch.equal(grouped[..., 15:18], plain[..., :1].expand(1, 4, 3))


def test_query_norms_are_straight_through() -> None:
    q = randn(2, 8, 5, 4).requires_grad_()
    scores = query_norms(q)
    assert scores.shape == (2, 5, 8) and scores.dtype == torch.float32
    gates, share, chosen = hard(scores[..., 3:], 2, 3, straight_through=True)
    assert torch.equal(gates.detach().sum(-1), torch.full((2, 5), 5.0)) and torch.equal(
        gates[..., :3], torch.ones(2, 5, 3)
    )
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    weight = randn(2, 5, 8, seed=4)
    (gates * weight).sum().backward()
    with torch.no_grad():
        want = weight.transpose(1, 2)[..., None] * q / q.norm(dim=-1, keepdim=True)
        want[:, :3] = 0
    torch.testing.assert_close(q.grad, want)


def test_bfloat16_norms_are_those_of_float32() -> None:
    q = randn(1, 8, 300, 64).to(torch.bfloat16)
    exact = q.double().norm(dim=-1).transpose(1, 2)
    assert torch.equal(choose(query_norms(q), 4), choose(exact, 4))
    rough = q.norm(dim=-1).transpose(1, 2)
    assert not torch.equal(choose(rough, 4), choose(exact, 4))


def test_ridge_gates_by_predicted_importance() -> None:
    r, x = router("ridge"), randn(2, 6, WIDTH)
    assert torch.equal(r(x).gates, torch.tensor([1.0] * 5 + [0.0] * 3).expand(2, 6, 8))  # before calibration
    coefficients, intercept = randn(6, WIDTH, seed=2), randn(6, seed=3)
    units = torch.tensor([7, 0, 1, 2, 3, 4, 5, 6])
    r.fill(units, 2, coefficients, intercept)
    scores = x.double() @ coefficients.double().T + intercept.double()
    for b in range(2):
        for n in range(6):
            best = scores[b, n].topk(2).indices.tolist()
            on = {7, 0, *(units[2 + i].item() for i in best)}
            assert set(r(x).gates[b, n].nonzero().flatten().tolist()) == on
    assert not list(r.parameters()) and set(r.state_dict()) == {"units", "routed", "coefficients", "intercept"}


def test_half_precision_routes_as_its_own_numbers_in_float32() -> None:
    r = filled(router()).to(torch.bfloat16)
    x = randn(1, 200, WIDTH).to(torch.bfloat16)
    assert r.units.dtype == torch.int64
    found = r(x)
    assert found.gates.dtype == torch.float32
    wide = copy.deepcopy(r).float()
    assert torch.equal(wide(x.float()).gates, found.gates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(r(x).gates, found.gates)


def test_two_stage_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.3, 0.2]]]))
    gates, share, chosen = two_stage(logits, None, torch.zeros(1, 1, 2), 2, shared_count=1)
    torch.testing.assert_close(gates[0, 0], torch.tensor([1.0, 1.25, 0.75, 0.0]))
    torch.testing.assert_close(share[0, 0], torch.tensor([0.5, 0.3, 0.2]))
    gates, _, _ = two_stage(logits, None, torch.zeros(1, 1, 2), 2, shared_count=1, scale="paper")
    torch.testing.assert_close(gates[0, 0], torch.tensor([0.5, 0.25, 0.15, 0.0]))


@pytest.mark.parametrize(
    ("options", "heads", "group", "want"),
    [
        ({"router": "query_norm"}, 32, 4, (32, 16, 8, 1)),  # the paper's LLaMA3-8B
        ({"router": "learned"}, 12, 1, (12, 3, 6, 1)),
        ({"active": 0.5, "router": "query_norm"}, 32, 4, (32, 11, 5, 1)),
        ({"active": 0.5}, 2, 1, (2, 0, 1, 1)),
        ({"active": 0.1}, 4, 1, (4, 0, 1, 1)),
        ({"active": 24, "shared": 16}, 32, 4, (32, 16, 8, 1)),
        ({"active": 24, "shared": 8, "granularity": "group"}, 32, 4, (8, 2, 4, 4)),
        ({"active": 1.0, "shared": 0}, 4, 1, (4, 0, 4, 1)),
    ],
)
def test_budgets(options: dict[str, Any], heads: int, group: int, want: tuple[int, ...]) -> None:
    budget = MoHConfig(**options).budget(heads, group)
    assert tuple(budget) == want and budget.experts == want[0] - want[1] and budget.active == want[1] + want[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"active": 0}, "active=0"),
        ({"active": 1.5}, "active=1.5: give a share of the heads above 0"),
        ({"active": True}, "active=True"),
        ({"shared": 1.0}, "shared=1.0"),
        ({"router": "norms"}, "legal are 'auto', 'learned', 'ridge', 'query_norm'"),
        ({"scale": "mine"}, "legal are 'code', 'paper'"),
        ({"granularity": "layer"}, "legal are 'head', 'group'"),
        ({"scale": "paper", "router": "ridge"}, "are 0 or 1"),
    ],
)
def test_options_that_make_no_method(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoHConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"active": 9}, "are 9 and 2: legal are 1..8 active"),
        ({"active": 2, "shared": 2}, "a router needs one to choose"),
        ({"active": 3, "granularity": "group"}, "a multiple of 2, a group's heads"),
    ],
)
def test_numbers_that_do_not_fit_a_layer(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoHConfig(**options).budget(8, 2)


def test_a_single_group_is_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="the 8 heads of a layer share one KV head"):
        MoHConfig(active=0.5, granularity="group").budget(8, 8)
    assert MoHConfig(active=8, granularity="group").budget(8, 8) == Budget(1, 0, 1, 8)


def test_what_auto_is() -> None:
    method, plain, normed = MoH(), SiteShape(32, 128, kv_heads=8), SiteShape(32, 128, kv_heads=8, q_norm=True)

    def settled(kind: Any, shape: SiteShape, **options: Any) -> MoHConfig:
        found = method.settled(MoHConfig(**options), [(kind, shape)])
        assert isinstance(found, MoHConfig)
        return found

    assert settled("causal", plain) == MoHConfig(active=0.75, shared=0.5, router="query_norm")
    assert settled("causal", plain, active=24) == settled("causal", plain)
    assert settled("causal", normed).router == settled("self", plain).router == "learned"
    assert settled("causal", plain, scale="paper").router == "learned"
    with pytest.raises(ValueError, match="legal are 'learned' and 'ridge'"):
        settled("causal", normed, router="query_norm")
    mixed = [("self", SiteShape(8, 4)), ("self", SiteShape(4, 4))]
    assert method.settled(MoHConfig(), mixed) == MoHConfig(router="learned")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 to 8 heads: give shares"):
        method.settled(MoHConfig(active=3), mixed)  # type: ignore[arg-type]


def test_heads_go_where_they_give_most() -> None:
    marginals = [[0.9, 0.08, 0.02, 0.0], [0.3, 0.3, 0.25, 0.15]]
    assert allotted(marginals, 4, [1, 1]) == [1, 3]
    assert allotted(marginals, 5, [1, 1]) == [1, 4]
    assert allotted(marginals, 6, [1, 1]) == [2, 4]
    assert allotted(marginals, 6, [1, 1], equal=[3, 3]) == [3, 3]
