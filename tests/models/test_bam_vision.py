"""Experts of a vision transformer: what the mixture computes, how it is saved, trained, compiled and patched."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

import attn_plugins
from attn_plugins.models import bam
from attn_plugins.models.bam.attention import BamAttention
from attn_plugins.models.bam.feed_forward import BamFeedForward
from attn_plugins.models.bam.watching import watch_routers
from tests.support.bam import MODES, all_to, dense_vit, error, expert, loud, mixed, mixture, pixels, routers

CLOSE = 2e-6
SOFT = ("all_params", "shared_kv")
LABELS = torch.tensor([1, 4])


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_identical_experts_are_the_dense_model_with_any_router(mode: str) -> None:
    base = dense_vit()
    model = loud(mixed([base, base, base], mode, allow_identical=True))
    wanted = base(pixels()).logits
    assert error(model(pixels()).logits, wanted) < CLOSE
    for name, weight in model.named_parameters():
        if "down_proj" in name and not name.endswith("bias"):
            weight *= 1.001
    assert error(model(pixels()).logits, wanted) > CLOSE


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_one_hot_router_is_its_expert(mode: str) -> None:
    base = dense_vit()
    experts = [base, expert(base, 1, mode), expert(base, 2, mode)]
    if mode == "shared_kv":  # keys and values are the base's, biases too
        assert torch.equal(experts[1].vit.layers[0].attention.k_proj.bias, base.vit.layers[0].attention.k_proj.bias)
    model = mixed(experts, mode)
    for number in range(len(experts)):
        with all_to(model, number):
            found = model(pixels()).logits
        for other, wanted in enumerate(experts):
            assert (error(found, wanted(pixels()).logits) < CLOSE) == (other == number), (number, other)


@pytest.mark.parametrize("mode", SOFT)
@torch.no_grad()
def test_attention_is_the_sum_of_gated_experts(mode: str) -> None:
    base = dense_vit()
    experts = [base, expert(base, 1), expert(base, 2)]  # k and v differ too
    model = loud(mixed(experts, mode))
    own = [one.vit.layers[0].attention for one in experts]
    if mode == "shared_kv":
        for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            mean = torch.stack([one.get_parameter(name).double() for one in own]).mean(0).float()
            for one in own:
                one.get_parameter(name).copy_(mean)
    attention = next(module for module in model.modules() if isinstance(module, BamAttention))
    x = torch.randn(2, 7, 32)
    gates = attention.mix.router(x)[1]
    wanted = sum(gates[..., number, None] * one(x)[0] for number, one in enumerate(own))
    assert error(attention(x)[0], wanted) < CLOSE
    assert error(attention(x)[0].roll(1, 1), wanted) > 0.1


@pytest.mark.parametrize("mode", SOFT)
@torch.no_grad()
def test_any_attention_implementation_and_size_of_picture(mode: str) -> None:
    model = mixture("vit", mode)
    assert isinstance(model.vit.layers[0].attention, BamAttention)
    large = {"pixel_values": pixels(size=48), "interpolate_pos_encoding": True}
    wanted = [model(pixels()).logits, model(**large).logits]
    model.set_attn_implementation("eager")
    found = model(pixels(), output_attentions=True)
    assert error(found.logits, wanted[0]) < CLOSE and error(model(**large).logits, wanted[1]) < CLOSE
    assert [weights.shape for weights in found.attentions] == [(2, 12, 17, 17)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_round_trip_keeps_every_bit(mode: str, tmp_path: Any) -> None:
    model = mixture("vit", mode)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model) is bam.AttnPluginsBamViTForImageClassification
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert error(loaded.eval()(pixels()).logits, model(pixels()).logits) < CLOSE
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert error(model.classifier(body(pixels()).last_hidden_state[:, 0]), model(pixels()).logits) < CLOSE
    told = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    file, name = told["AutoModelForImageClassification"].split(".")
    assert (tmp_path / f"{file}.py").is_file() and bam.named_class(name) is type(model)


def trained(mode: str = "all_params", **config: Any) -> Any:
    model = mixture("vit", mode).train()
    for key, value in {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2, **config}.items():
        setattr(model.config, key, value)
    return model


def gradients(model: Any, loss: Any) -> torch.Tensor:
    model.zero_grad()
    loss(model).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def written_out(model: Any) -> torch.Tensor:
    """Cross-entropy + alpha N sum f P + beta mean(lse^2), of all tokens of the batch, the class token's too."""
    caught: list[Any] = []
    blocks = [module for module in model.modules() if isinstance(module, BamFeedForward)]
    hooks = [block.router.register_forward_hook(lambda module, args, out: caught.append(out)) for block in blocks]
    loss = torch.nn.functional.cross_entropy(model.eval()(pixels()).logits, LABELS)
    model.train()
    for hook in hooks:
        hook.remove()
    for logits, shares in caught:
        f = torch.nn.functional.one_hot(shares.flatten(0, 1).argmax(-1), 3).float().mean(0)
        loss = loss + 0.3 * 3 * (f * shares.flatten(0, 1).mean(0)).sum() / len(blocks)
        loss = loss + 0.2 * logits.logsumexp(-1).square().mean() / len(blocks)
    return loss


def test_training_adds_the_two_losses_however_labels_are_given() -> None:
    model = trained()
    wanted = gradients(model, written_out)
    calls = {
        "by name": lambda model: model(pixel_values=pixels(), labels=LABELS).loss,
        "in order": lambda model: model(pixels(), LABELS).loss,
        "a tuple": lambda model: model(pixels(), labels=LABELS, return_dict=False)[0],
        "joined": lambda model: model.joined(torch.nn.functional.cross_entropy(model(pixels()).logits, LABELS)),
        "of all that are counted": lambda model: 2 * model(pixels(), LABELS, num_items_in_batch=torch.tensor(4)).loss,
    }
    for name, loss in calls.items():
        assert error(gradients(model, loss), wanted) < 1e-5, name
    loss = model(pixels(), LABELS).loss
    assert torch.equal(loss, model.eval()(pixels(), LABELS).loss)  # the main loss alone is what comes back
    assert error(gradients(trained(router_aux_loss_coef=0.0), calls["in order"]), wanted) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", SOFT)
def test_checkpointing_gives_the_same_gradients(mode: str, reentrant: bool) -> None:
    model = trained(mode)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        again.enable_input_require_grads()
    loss = lambda model: model(pixels(), LABELS).loss  # noqa: E731
    assert error(gradients(again, loss), gradients(model, loss)) < CLOSE


def test_it_compiles_whole_in_training() -> None:
    torch._dynamo.reset()
    model = trained("shared_kv")
    loss = lambda model: model(pixels(), labels=LABELS).loss  # noqa: E731
    wanted = gradients(model, loss)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(pixels(), labels=LABELS).loss.backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    assert error(found, wanted) < 1e-5


@torch.no_grad()
def test_a_watch_tells_each_layers_shares() -> None:
    model = mixture("vit", "shared_kv")
    watch = watch_routers(model)
    model(pixels())
    rows = watch.rows()
    watch.close()
    assert [row.name for row in rows] == [f"vit.layers.{n}.{part}" for n in (0, 1) for part in ("attention", "mlp")]
    assert all(len(row.load) == 3 and sum(row.load) == pytest.approx(1, abs=1e-5) for row in rows)


@pytest.mark.parametrize("mode", SOFT)
@torch.no_grad()
def test_other_methods_patch_a_mixture_as_they_do_its_dense_model(mode: str) -> None:
    model = mixture("vit", mode)
    wanted = model(pixels()).logits
    with attn_plugins.patched(model, "gna", window=4, stride=1, min_tokens=0) as handle:
        assert len(handle.patches[0].layers) == 2
        assert error(model(pixels()).logits, wanted) < CLOSE  # the window is the grid
    with attn_plugins.patched(model, "gna", window=2, stride=1, min_tokens=0):
        assert error(model(pixels()).logits, wanted) > 1e-3
    assert torch.equal(model(pixels()).logits, wanted)


@pytest.mark.parametrize("mode", SOFT)
@torch.no_grad()
def test_experts_in_a_loaded_model_are_those_of_the_mixture(mode: str) -> None:
    base = dense_vit()
    other = expert(base, 1)
    state = {name: weight for name, weight in base.state_dict().items() if ".mlp." in name}
    other.load_state_dict(state, strict=False)  # a mixture differs by its attention alone
    model = loud(mixed([base, other], mode))
    wanted = base(pixels()).logits
    attn_plugins.patch(base, "bam", experts=[other], attention=mode)
    gates = [router for name, router in model.named_modules() if name.endswith("mix.router")]
    for mine, its in zip(routers(base), gates, strict=True):
        mine.weight.copy_(its.weight)
    assert error(base(pixels()).logits, model(pixels()).logits) < CLOSE
    attn_plugins.unpatch(base)
    assert torch.equal(base(pixels()).logits, wanted)


def test_half_precision() -> None:
    model = mixture("vit", "shared_kv")
    wanted = model(pixels()).logits
    found = model.bfloat16()(pixels()).logits
    assert found.dtype == torch.bfloat16 and 0 < error(found.float(), wanted) < 0.1
