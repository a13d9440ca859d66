"""The balance loss and the statistics of routers: by formula, under accumulation, checkpointing, padding, scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from attn_plugins.training.routers import RouterWatch, balance_loss, table
from tests.support.moh import patch, scrambled
from tests.support.tiny import randn
from tests.support.tiny_language import prompt, tiny

Grads = dict[str, torch.Tensor]


def shares(*shape: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    share = randn(*shape, seed=seed).double().softmax(-1).requires_grad_()
    return share, share >= share.topk(2, dim=-1).values[..., -1:]


def test_the_loss_is_the_papers() -> None:
    share, chosen = shares(2, 7, 5)
    want = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        p = share[..., i].sum() / 14
        f = chosen[..., i].sum() / 14
        want = want + p * f
    torch.testing.assert_close(balance_loss(share, chosen, over="batch"), 25 * want / 5)
    items = torch.stack([balance_loss(share[b : b + 1], chosen[b : b + 1], over="batch") for b in range(2)])
    torch.testing.assert_close(balance_loss(share, chosen), items.mean())
    even = torch.full((1, 5, 5), 0.2)
    cyclic = torch.stack([torch.eye(5)[i] + torch.eye(5)[(i + 1) % 5] for i in range(5)])[None].bool()
    torch.testing.assert_close(balance_loss(even, cyclic), torch.tensor(2.0))  # K


@pytest.mark.parametrize("over", ["item", "batch"])
def test_padding_is_left_out(over: str) -> None:
    share, chosen = shares(2, 7, 5)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, :3] = real[1, 5:] = False
    found = balance_loss(share, chosen, real, over)
    with torch.no_grad():
        other = torch.where(real[..., None], share, 9.0)
    torch.testing.assert_close(balance_loss(other, chosen ^ ~real[..., None], real, over), found.detach())
    (grad,) = torch.autograd.grad(found, share)
    assert not grad[~real].any() and grad[real].abs().max() > 0
    alone = real.clone()
    alone[0] = False  # an item of padding alone is none
    torch.testing.assert_close(balance_loss(share, chosen, alone, over), balance_loss(share[1:], chosen[1:], real[1:]))


def built(router: str = "learned", architecture: str = "Llama", **options: Any) -> tuple[Any, Any]:
    model = tiny(architecture)
    handle = scrambled(patch(model, router=router, active=0.75, **options))
    return model.train(), handle


def main_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over items of each item's mean: what a batch in parts adds up to."""
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    rows = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    rows = rows.view(len(ids), -1) * mask[:, 1:]
    return (rows.sum(1) / mask[:, 1:].sum(1)).mean()


def gradients(
    model: Any, watch: RouterWatch, parts: int = 1, scale: float = 1.0, batch: int = 4, **padding: Any
) -> Grads:
    model.zero_grad()
    ids, mask = prompt(batch=batch, **padding)
    for some, here in zip(ids.chunk(parts), mask.chunk(parts), strict=True):
        loss = watch.joined(main_loss(model, some, here)) / parts * scale
        loss.backward()
    return {name: p.grad.clone() / scale for name, p in model.named_parameters() if p.grad is not None}


def close(found: Grads, want: Grads) -> bool:
    assert found.keys() == want.keys()
    largest = max(grad.abs().max().item() for grad in want.values())
    return all(torch.allclose(found[name], want[name], rtol=1e-4, atol=1e-5 * largest) for name in want)


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_the_gradient_is_that_of_the_sum_of_losses(router: str) -> None:
    """Tied to the gates or added to the main loss: the same. And it can be told from none."""
    model, handle = built(router)
    watch = RouterWatch.of(handle, weight=0.5)
    tied = gradients(model, watch)
    kept: list[torch.Tensor] = []
    for layer in handle.patches[0].layers:
        layer.watch = lambda gates, share, chosen, real: kept.append(balance_loss(share, chosen, real)) or gates
    model.zero_grad()
    ids, mask = prompt(batch=4)
    loss = main_loss(model, ids, mask)
    (loss + 0.5 * torch.stack(kept).mean()).backward()
    added = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert close(tied, added)
    watch.close()
    assert not close(gradients(model, RouterWatch(0.0)), tied)


@pytest.mark.parametrize("padding", [{}, {"left": (0, 4, 2, 1)}, {"right": (3, 0, 0, 2)}])
def test_a_batch_in_four_parts_has_the_gradients_of_the_whole(padding: dict[str, Any]) -> None:
    model, handle = built()
    watch = RouterWatch.of(handle, weight=0.5)
    whole, parts = gradients(model, watch, **padding), gradients(model, watch, parts=4, **padding)
    assert close(parts, whole)
    assert close(gradients(model, watch, parts=4, scale=1024.0, **padding), whole)  # a gradient scaler's
    forgetful = gradients(
        model, RouterWatch(0.0), parts=4, **padding
    )  # it is not joined: the balance loss counts in full
    assert not close(forgetful, whole)


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(router: str, reentrant: bool) -> None:
    model, handle = built(router)
    watch = RouterWatch.of(handle, weight=0.5)
    padding = {"left": (0, 4, 2, 1)}
    want, rows = gradients(model, watch, **padding), watch.rows()
    watch.reset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, watch, parts=4, **padding)
    assert close(found, want)
    for row, other in zip(watch.rows(), rows, strict=True):
        assert row.load == pytest.approx(other.load) and row.balance == pytest.approx(other.balance)


def test_what_the_trainer_divides_by_is_told() -> None:
    """A main loss that is summed and divided by all tokens of the step arrives with a gradient of 1 in each part."""
    model, handle = built()
    watch = RouterWatch.of(handle, weight=0.5)
    want = gradients(model, watch)
    model.zero_grad()
    ids, mask = prompt(batch=4)
    for some, here in zip(ids.chunk(4), mask.chunk(4), strict=True):
        watch.joined(main_loss(model, some, here) / 4, share=1 / 4).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert close(found, want)


def test_rows_of_routers_that_were_not_chosen_learn_from_the_balance_alone() -> None:
    model, handle = built()
    for layer in model.model.layers:
        layer.self_attn.moh.w_r.weight.data[0] = 0
        layer.self_attn.moh.routed.fill_(1)

    def hook(router: Any, args: Any, routing: Any) -> None:
        router.seen = routing.chosen.any(1).any(0)

    for layer in model.model.layers:
        layer.self_attn.moh.register_forward_hook(hook)
    ids, mask = prompt(batch=1, tokens=2)
    main_loss(model, ids, mask).backward()
    skipped = 0
    for layer in model.model.layers:
        router = layer.self_attn.moh
        grad = router.w_r.weight.grad
        assert not grad[~router.seen].any()
        skipped += int((~router.seen).sum())
    assert skipped
    model.zero_grad()
    watch = RouterWatch.of(handle, weight=1.0)
    watch.joined(main_loss(model, ids, mask)).backward()
    assert all((layer.self_attn.moh.w_r.weight.grad.abs().amax(1) > 0).all() for layer in model.model.layers)


def test_statistics() -> None:
    model, handle = built("ridge", shared=1)
    model.eval()
    watch = RouterWatch.of(handle)
    for number, layer in enumerate(model.model.layers):
        router = layer.self_attn.moh
        router.coefficients.zero_()
        router.intercept.copy_(torch.tensor([3.0, 1.0, 2.0] if number else [1.0, 1.0, 1.0]))
        router.routed.fill_(1 if number else 2)
    ids, mask = prompt(left=(0, 4))
    with torch.no_grad():
        for _ in range(2):
            model(ids, attention_mask=mask)
    first, second = watch.rows()
    assert first.load == (1.0, 1.0, 0.0) and second.load == (1.0, 0.0, 0.0)
    assert (first.dead, second.dead) == (1, 2)
    assert first.entropy == pytest.approx(math.log(2) / math.log(3)) and second.entropy == 0
    assert first.certainty == pytest.approx(0, abs=1e-6)
    assert first.balance == pytest.approx(2) and second.balance == pytest.approx(1.5)
    assert first.name == "model.layers.0.self_attn" and len(list(table(watch.rows()))) == 3
    assert watch.layers[0].sums is not None and watch.layers[0].sums[0, -1] == 2 * mask.sum()
    doubled = watch.rows(lambda sums: 2 * sums)
    assert doubled[0].load == first.load
    watch.reset()
    assert not watch.rows()
    watch.close()
    with torch.no_grad():
        model(ids)
    assert not watch.rows() and all(layer.watch is None for layer in handle.patches[0].layers)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="weight=-1"):
        RouterWatch(weight=-1)
    with pytest.raises(ValueError, match="legal are 'item' and 'batch'"):
        RouterWatch(over="token")


def test_a_watch_that_is_closed_leaves_a_later_one_be() -> None:
    model = tiny("Llama")
    handle = patch(model, router="learned")
    first, second = RouterWatch.of(handle), RouterWatch.of(handle)
    first.close()
    model(prompt()[0])
    assert len(second.rows()) == 2 and not first.rows()
    second.close()
    assert all(layer.watch is None for layer in handle.patches[0].layers)
