"""The losses of the routers: what they are, and that nothing that is done around a model loses or doubles them."""

from __future__ import annotations

import copy

import pytest
import torch

from attn_plugins.models.bam.feed_forward import BamFeedForward
from attn_plugins.models.bam.watching import watch_routers
from tests.support.bam import NAMES, error, ids, mixture, routers

ALPHA, BETA = 0.3, 0.2  # far above what is used: their gradients are seen
CLOSE = 2e-6


def trained(name="llama", mode="shared_kv", **config):
    model = mixture(name, mode)
    told = {"router_aux_loss_coef": ALPHA, "router_z_loss_coef": BETA, **config}
    for key, value in told.items():
        setattr(model.config, key, value)
    return model.train()


def gradients(model, run):
    model.zero_grad()
    run(model)
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def written_out(model, batch, mask, over="batch"):
    """NLL + alpha N sum f P + beta mean(lse^2), with the logits of the feed-forwards' routers caught by hooks."""
    caught = []
    blocks = [module for module in model.modules() if isinstance(module, BamFeedForward)]
    hooks = [block.router.register_forward_hook(lambda module, args, out: caught.append(out)) for block in blocks]
    model.eval()  # no losses of its own
    loss = model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss
    model.train()
    for hook in hooks:
        hook.remove()
    real = mask.bool()
    for logits, shares in caught:
        groups = [real] if over == "batch" else [real & (torch.arange(2) == item)[:, None] for item in range(2)]
        for group in groups:
            p = shares[group].mean(0)
            f = torch.nn.functional.one_hot(shares[group].argmax(-1), 3).float().mean(0)
            loss = loss + ALPHA * 3 * (f * p).sum() / len(groups) / len(blocks)
        loss = loss + BETA * logits[real].logsumexp(-1).square().mean() / len(blocks)
    return loss


def padded():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return ids().masked_fill(mask == 0, 0), mask


def run(batch, mask):
    return lambda model: model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss.backward()


@pytest.mark.parametrize("over", ["batch", "item"])
@pytest.mark.parametrize("name", NAMES)
def test_training_adds_the_two_losses_and_leaves_padding_out(name, over):
    model = trained(name, router_loss_over=over)
    batch, mask = padded()
    found = gradients(model, run(batch, mask))
    wanted = gradients(model, lambda model: written_out(model, batch, mask, over).backward())
    assert error(found, wanted) < 1e-5
    other = gradients(
        model, lambda model: written_out(model, batch, mask, "item" if over == "batch" else "batch").backward()
    )
    assert error(found, other) > 1e-4


def test_the_loss_that_comes_back_is_the_nll_and_evaluation_has_none():
    model = trained()
    loss = model(ids(), labels=ids()).loss
    assert torch.equal(loss, model.eval()(ids(), labels=ids()).loss)
    as_tuple = model.train()(ids(), labels=ids(), return_dict=False)
    assert torch.equal(as_tuple[0], loss) and as_tuple[1].shape == (2, 9, 64)
    plain = gradients(trained(router_aux_loss_coef=0.0, router_z_loss_coef=0.0), run(*padded()))
    assert torch.equal(gradients(model.eval(), run(*padded())), plain)
    assert error(gradients(model.train(), run(*padded())), plain) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["all_params", "shared_kv"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name, mode, reentrant):
    model = trained(name, mode)
    wanted = gradients(model, run(*padded()))
    again = trained(name, mode)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        again.enable_input_require_grads()
    assert error(gradients(again, run(*padded())), wanted) < CLOSE
    again.config.router_aux_loss_coef = 0.0
    assert error(gradients(again, run(*padded())), wanted) > 1e-4


def test_two_calls_before_one_backward_keep_to_their_own_padding():
    batch, mask = padded()

    def both(model):
        one = model(batch, attention_mask=mask, labels=batch).loss
        (one + model(ids(3, 5), labels=ids(3, 5)).loss).backward()

    model = trained()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = [
        gradients(model, lambda model: model(batch, attention_mask=mask, labels=batch).loss.backward()),
        gradients(model, lambda model: model(ids(3, 5), labels=ids(3, 5)).loss.backward()),
    ]
    assert error(gradients(model, both), sum(parts)) < 1e-5


def test_scaling_the_loss_scales_all():
    model = trained()
    one = gradients(model, lambda model: model(ids(), labels=ids()).loss.backward())
    many = gradients(model, lambda model: (model(ids(), labels=ids()).loss * 1024 / 8).backward())
    assert error(many / 128, one) < CLOSE


def test_trainers_division_by_all_tokens_divides_these_losses_too():
    """Trainer gives `num_items_in_batch` and divides no further: two equal halves are the whole."""
    model = trained(router_loss_over="item")
    whole = gradients(model, lambda model: model(ids(), labels=ids(), num_items_in_batch=16).loss.backward())

    def halves(model):
        for row in ids():
            model(row[None], labels=row[None], num_items_in_batch=torch.tensor(16)).loss.backward()

    assert error(gradients(model, halves), whole) < 1e-5
    plain = gradients(model, lambda model: model(ids(), labels=ids()).loss.backward())
    assert error(whole, plain) < 1e-5


@pytest.mark.filterwarnings("ignore")  # of a data loader that pins memory without a device
def test_trainer_accumulates_to_the_same_step(tmp_path):
    from transformers import Trainer, TrainingArguments

    def step(accumulated):
        model = trained(router_loss_over="item")
        told = TrainingArguments(
            str(tmp_path), gradient_accumulation_steps=accumulated, per_device_train_batch_size=4 // accumulated,
            max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e9, lr_scheduler_type="constant", report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no", gradient_checkpointing=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids(4)]
        Trainer(model=model, args=told, train_dataset=rows).train()
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    start = torch.cat([weight.detach().flatten() for weight in trained().parameters()])
    whole = step(1) - start
    assert error(step(4) - start, whole) < 1e-4  # differences of weights: their last bits
    one = gradients(trained(router_loss_over="item"), lambda model: model(ids(4), labels=ids(4)).loss.backward())
    assert error(whole, -one) < 1e-4


def test_who_computes_the_loss_from_logits_joins_it():
    def run(model):
        logits = model(ids()).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        (model.joined(loss) * 3).backward()

    model = trained()
    wanted = gradients(model, lambda model: (model(ids(), labels=ids()).loss * 3).backward())
    assert error(gradients(model, run), wanted) < 1e-5


def test_compiled_training_has_the_same_gradients():
    torch._dynamo.reset()
    model = trained()
    wanted = gradients(model, run(*padded()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch, mask = padded()
    model.zero_grad()
    out = compiled(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100), use_cache=False)
    out.loss.backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    assert error(found, wanted) < 1e-5


def test_a_few_steps_spread_the_tokens():
    """The balance loss does what it is there for; without it the same steps leave the shares as they were."""
    spread = {}
    for alpha in (0.0, 3.0):
        model = trained(router_aux_loss_coef=alpha, router_z_loss_coef=0.0)
        for weight in model.parameters():
            weight.requires_grad_(False)
        for router in routers(model):
            router.weight.requires_grad_(True)
        optimizer = torch.optim.Adam([router.weight for router in routers(model)], lr=0.05)
        for _ in range(30):
            model(ids(4, 16), labels=ids(4, 16)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        watch = watch_routers(model)
        model.eval()(ids(4, 16))
        spread[alpha] = [row.balance for row in watch.rows() if row.name.endswith("mlp")]
    assert max(spread[3.0]) < 1.1 < max(spread[0.0])  # 1 is even, N is all to one


@torch.no_grad()
def test_a_watch_tells_each_layers_shares_without_padding():
    model = mixture("phi")
    watch = watch_routers(model)
    batch, mask = padded()
    wanted = model(batch, attention_mask=mask).logits
    rows = {row.name: row for row in watch.rows()}
    assert list(rows) == [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn", "mlp")]
    assert sum(rows["model.layers.0.mlp"].load) == pytest.approx(1)
    caught = []
    blocks = {name: module for name, module in model.named_modules() if name in rows}
    hook = blocks["model.layers.0.mlp"].router.register_forward_hook(lambda m, a, out: caught.append(out[1]))
    hook2 = blocks["model.layers.0.self_attn"].mix.router.register_forward_hook(lambda m, a, out: caught.append(out[1]))
    watch.close()
    assert torch.equal(model(batch, attention_mask=mask).logits, wanted)
    hook.remove(), hook2.remove()
    attention, feed_forward = (shares[mask.bool()] for shares in caught)
    chosen = torch.nn.functional.one_hot(feed_forward.argmax(-1), 3).double().mean(0)
    assert rows["model.layers.0.mlp"].load == pytest.approx(chosen.tolist())
    assert rows["model.layers.0.self_attn"].load == pytest.approx(attention.double().mean(0).tolist(), abs=1e-6)
    assert not watch.rows() and all(module.watch is None for module in model.modules() if hasattr(module, "watch"))


def test_only_mixtures_are_watched():
    with pytest.raises(ValueError, match="Linear has no routers of BAM"):
        watch_routers(torch.nn.Linear(2, 2))


def test_a_copy_of_a_trained_model_is_its_own():
    model = trained()
    model(ids(), labels=ids()).loss.backward()
    assert torch.equal(copy.deepcopy(model).eval()(ids()).logits, model.eval()(ids()).logits)
