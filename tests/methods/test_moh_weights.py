"""Routers on a model: in files of both libraries, beside a LoRA, calibrated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.methods.moh import calibrate
from attn_plugins.methods.moh.moments import Moments
from tests.support import tiny_vision
from tests.support.moh import patch, scrambled
from tests.support.snapshot import snapshot
from tests.support.tiny import randn
from tests.support.tiny_language import prompt, tiny

ROUTERS = pytest.mark.parametrize("router", ["learned", "ridge", "query_norm"])


def logits(model: Any, **given: Any) -> torch.Tensor:
    ids, mask = prompt(left=(0, 4))
    with torch.no_grad():
        return model(ids, attention_mask=mask, **given).logits[mask.bool()]


@ROUTERS
def test_weights_alone_go_to_a_folder_and_back(router: str, tmp_path: Path) -> None:
    model, other = tiny("Llama"), tiny("Llama")
    handle = scrambled(patch(model, router=router, active=3, shared=1))
    want = logits(model)
    handle.save_weights(tmp_path)
    (row,) = json.loads((tmp_path / "attn_plugins.json").read_text())
    options = {"active": 0.75, "shared": 0.25, "router": router}
    assert {"active": 0.75, **row["options"]} == options
    loaded = attn_plugins.load(other, tmp_path)
    assert torch.equal(logits(other), want) and loaded.patches[0].config == handle.patches[0].config
    if router != "query_norm":
        assert other.model.layers[0].self_attn.moh.units.tolist() != [0, 1, 2, 3]  # buffers too
        loaded.remove()
        with pytest.raises(ValueError, match="not patched any more"):
            loaded.load_weights(tmp_path)


@ROUTERS
def test_saved_and_loaded_by_one_line(router: str, tmp_path: Path) -> None:
    model = tiny("Llama")
    scrambled(patch(model, router=router))
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = attn_plugins.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), want)
    attn_plugins.unpatch(model)
    attn_plugins.unpatch(loaded)
    assert torch.equal(logits(loaded), logits(model)) and not hasattr(loaded.config, "attn_plugins")


def test_vision_models_are_saved_and_loaded(tmp_path: Path) -> None:
    model, given = tiny_vision.build("DINOv2"), tiny_vision.inputs("DINOv2", 2)
    scrambled(patch(model, active=0.5))
    want = tiny_vision.features("DINOv2", model, given)
    model.save_pretrained(tmp_path)
    loaded = attn_plugins.from_pretrained(tmp_path).eval()
    assert torch.equal(tiny_vision.features("DINOv2", loaded, given), want)


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_diffusion_models_are_saved_and_loaded(name: str, tmp_path: Path, quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS, forward

    model, given = MODELS[name].build(), MODELS[name].inputs(1, 0)
    model.save_pretrained(tmp_path / "dense")  # which writes the versions into the config of the model too
    dense, before, config = forward(model, given), snapshot(model), dict(model.config)
    scrambled(patch(model, active=0.5))
    want = forward(model, given)
    model.save_pretrained(tmp_path)
    loaded = attn_plugins.from_pretrained(tmp_path)
    close = {"rtol": 1e-5, "atol": 2e-6}  # Wan's tables of rotation come back rounded otherwise, patched or not
    torch.testing.assert_close(forward(loaded, given), want, **close)
    assert type(loaded) is type(model) and not torch.allclose(want, dense, atol=1e-3)
    loaded.save_pretrained(tmp_path / "again")
    again = attn_plugins.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(forward(again, given), want, **close)
    for other in (model, loaded):
        attn_plugins.unpatch(other)
        torch.testing.assert_close(forward(other, given), dense, **close)
        assert "attn_plugins" not in other.config
        assert not hasattr(other.config, "attn_plugins")
    assert snapshot(model) == before and dict(model.config) == config
    assert torch.equal(forward(model, given), dense)


def test_loading_is_strict(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny("Llama")
    handle = scrambled(patch(model, router="ridge"))
    handle.save_weights(tmp_path)
    tensors = load_file(tmp_path / "attn_plugins.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"units", "routed", "coefficients", "intercept"}
    del tensors["model.layers.1.self_attn.moh.intercept"]
    save_file(tensors, tmp_path / "attn_plugins.safetensors")
    other = tiny("Llama")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(model.layers.1.self_attn: intercept"):
        attn_plugins.load(other, tmp_path)
    assert snapshot(other) == before
    learned = patch(other, router="learned")
    with pytest.raises(ValueError, match="is not of this patch"):
        learned.load_weights(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_on_a_base_that_is_not_patched(beside: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    handle = scrambled(patch(model, router="learned"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["moh"], init_lora_weights=False)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config)
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert any("moh.modules_to_save.default.w_r" in name for name in names) and any("lora_A" in name for name in names)
    for _, weight in handle.named_weights():
        weight.data.mul_(1.5)
    want = logits(wrapped)
    wrapped(prompt()[0]).logits.square().mean().backward()
    router = model.model.layers[0].self_attn.moh
    assert router.modules_to_save["default"].w_r.weight.grad.abs().max() > 0
    before = router.original_module.w_r.weight.clone()
    calibrate(handle, [prompt()[0]], progress=False)  # what PEFT has wrapped is what is filled
    assert torch.equal(router.original_module.w_r.weight, before)
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    if beside:
        handle.save_weights(tmp_path)
        torch.testing.assert_close(logits(attn_plugins.load_adapter(tiny("Llama"), tmp_path)), want)
        return
    bare = tiny("Llama")
    before = snapshot(bare)
    with pytest.raises(
        ValueError, match=r"tensors of 'moh' that LlamaForCausalLM has no place for .*attn_plugins.patch"
    ):
        attn_plugins.load_adapter(bare, tmp_path)
    assert snapshot(bare) == before
    patch(bare, router="learned")
    torch.testing.assert_close(logits(attn_plugins.load_adapter(bare, tmp_path)), want)
    other = tiny("Llama")
    patch(other, router="learned", shared=2)
    with pytest.raises(ValueError, match="no place for"):
        attn_plugins.load_adapter(other, tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter"):
        attn_plugins.load_adapter(other, tmp_path / "nothing")


def test_a_plain_lora_beside_routers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("Qwen3")
    handle = scrambled(patch(model, router="learned"))
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    want = logits(model)
    wrapped = peft.get_peft_model(model, config)
    assert any("moh.w_r.lora_A" in name for name, _ in wrapped.named_parameters())
    assert not torch.allclose(logits(wrapped), want, atol=1e-3)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), want)
    assert handle.active


def test_calibration_is_ridge_regression_of_what_heads_give() -> None:
    """By hand, on an unpatched model: inputs, parts of the output, the closed form."""
    model, plain = tiny("Llama"), tiny("Llama")
    ids, mask = prompt(batch=4, left=(0, 4, 2, 0))
    seen: list[Any] = []
    attention = plain.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        plain(ids, attention_mask=mask)
    real = mask.bool()
    x, o = seen[0][real].double(), seen[1][real].double()
    weight = attention.o_proj.weight.detach().double()
    norms = torch.stack(
        [(o[:, 8 * head : 8 * head + 8] @ weight[:, 8 * head : 8 * head + 8].T).norm(dim=1) for head in range(4)], 1
    )
    handle = patch(model, router="ridge", active=0.75)
    with torch.no_grad():
        dense = plain(ids, attention_mask=mask).logits
    halves = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, (ids[2:], mask[2:])]
    first, _ = calibrate(handle, halves, penalty=0.1, progress=False)
    best = int(norms.mean(0).argmax())
    rest = [head for head in range(4) if head != best]
    assert (first.shared, first.routed, first.count) == ((best,), tuple(rest), 2)
    ones = torch.cat([x, x.new_ones(len(x), 1)], 1)
    gram = ones.T @ ones
    added = 0.1 * gram.diagonal()[:-1].mean() * torch.eye(33, dtype=torch.float64)
    added[-1, -1] = 0
    want = torch.linalg.solve(gram + added, ones.T @ norms)
    router = model.model.layers[0].self_attn.moh
    torch.testing.assert_close(router.coefficients.double(), want[:-1].T[rest], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(router.intercept.double(), want[-1][rest], rtol=1e-3, atol=1e-5)
    left = (ones @ want - norms).square().sum() / (norms - norms.mean(0)).square().sum()
    assert first.fit == pytest.approx(1 - left.item(), abs=1e-3)
    with torch.no_grad():
        routed = model(ids, attention_mask=mask).logits
    assert not torch.allclose(routed[real], dense[real], atol=1e-2)


@pytest.mark.parametrize(("router", "granularity"), [("learned", "head"), ("ridge", "group"), ("learned", "group")])
def test_calibrated_routers_leave_out_less_than_static_ones(router: str, granularity: str) -> None:
    model = tiny("Llama", num_attention_heads=8, num_key_value_heads=4)
    ids, _ = prompt(batch=8, tokens=32)
    with torch.no_grad():
        dense = model(ids).logits
    handle = patch(model, router=router, active=0.5, granularity=granularity)
    rows = calibrate(handle, [ids], progress=False, run=lambda model, batch: model(input_ids=batch))
    with torch.no_grad():
        calibrated = (model(ids).logits - dense).square().mean()
        for layer in model.model.layers:
            router_ = layer.self_attn.moh
            part = router_.w_r.weight if router == "learned" else router_.coefficients
            part.zero_()
        static = (model(ids).logits - dense).square().mean()
    assert calibrated < 0.95 * static
    assert all(len(row.shared) + row.count == (4 if granularity == "head" else 2) for row in rows)
    if router == "learned":
        calibrate(handle, [ids], progress=False, run=lambda model, batch: model(input_ids=batch))
        x = randn(1, 30, 32)
        gates = model.model.layers[0].self_attn.moh(x).gates
        assert ((gates[gates != 0] - 1).abs() < 0.3).all()


def test_global_budgets_keep_the_mean() -> None:
    model = tiny("Llama", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    model.model.layers[1].self_attn.o_proj.weight.data[:, 4:] *= 0.01  # one head does nearly all there
    ids, _ = prompt(batch=4)
    handle = patch(model, router="ridge", active=0.5, shared=1)
    rows = calibrate(handle, [ids], budgets="global", progress=False)
    counts = [len(row.shared) + row.count for row in rows]
    assert sum(counts) == 12 and counts[1] == min(counts) < max(counts)
    assert [layer.self_attn.moh.routed.item() + 1 for layer in model.model.layers] == counts
    assert all(
        (layer.self_attn.moh(randn(1, 9, 32)).gates.sum(-1) == n).all()
        for layer, n in zip(model.model.layers, counts, strict=True)
    )


def test_calibration_undoes_its_listening_and_says_what_is_amiss(quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS

    model = tiny("Llama")
    ids, _ = prompt()
    with pytest.raises(ValueError, match="no router to calibrate"):
        calibrate(model, [ids])
    handle = patch(model)
    with pytest.raises(ValueError, match="query norms have no weights"):
        calibrate(handle, [ids])
    handle.remove()
    handle = patch(model, router="ridge")
    processors = [layer.processor for layer in handle.patches[0].layers]
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        calibrate(model, [{}])
    assert [layer.processor for layer in handle.patches[0].layers] == processors
    for options, words in (({"penalty": 0}, "penalty=0"), ({"budgets": "most"}, "legal are 'global', 'equal'")):
        with pytest.raises(ValueError, match=words):
            calibrate(handle, [ids], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 layers ran dense or not at all"):
        calibrate(handle, [ids], run=lambda model, batch: None, progress=False)
    wan = MODELS["wan"].build()
    rows = calibrate(patch(wan, router="ridge", active=0.5), [MODELS["wan"].inputs(2, 0)], progress=False)
    assert [row.name for row in rows] == ["blocks.0.attn1", "blocks.1.attn1"] and all(row.fit > 0 for row in rows)


def test_sums_do_not_depend_on_how_tokens_come() -> None:
    x, squares = randn(40, 6), randn(40, 3, seed=2).square()
    whole, parts = Moments(3), Moments(3)
    whole.add(x, squares)
    for a, b in zip(x.split(7), squares.split(7), strict=True):
        parts.add(a, b)
    for found, want in zip(parts.ridge(0.01), whole.ridge(0.01), strict=True):
        torch.testing.assert_close(found, want)
    assert math.isclose(parts.fit(0.01), whole.fit(0.01)) and math.isclose(sum(whole.marginal()), 1)
    assert whole.marginal() == sorted(whole.marginal(), reverse=True)


def test_a_lora_around_routers_goes_to_a_folder_and_back(tmp_path: Path) -> None:
    """The routers by their own names, what PEFT put around them with the adapter; neither without the other."""
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    handle = scrambled(patch(model, router="learned"))
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no place for"):  # the base is not patched
        attn_plugins.load_adapter(tiny("Llama"), tmp_path)
    handle.save_weights(tmp_path)
    assert torch.equal(logits(attn_plugins.load_adapter(tiny("Llama"), tmp_path)), want)
    with torch.no_grad():
        for name, weight in handle.named_weights():
            if "lora_" not in name:
                weight.zero_()
    handle.load_weights(tmp_path)  # into routers that have a LoRA around them
    assert torch.equal(logits(wrapped), want)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batches_that_are_not_finite_change_nothing(value: float) -> None:
    model = tiny("Llama")
    handle = scrambled(patch(model, router="ridge"))
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, _ = prompt()
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: out.index_fill(1, args[0][0, :1] * 0, value)
    )
    with pytest.raises(ValueError, match="saw nan or inf in these batches"):
        calibrate(handle, [ids], progress=False)
    hook.remove()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_one_batch_is_no_list_of_batches() -> None:
    handle = patch(tiny("Llama"), router="ridge")
    ids, _ = prompt()
    for batch in (ids, {"input_ids": ids}):
        with pytest.raises(TypeError, match=r"give a list of such, \[batch\]"):
            calibrate(handle, batch)


def test_sums_stay_on_the_cpu_under_another_default_device() -> None:
    with torch.device("meta"):
        moments = Moments(3)
    moments.add(randn(40, 6), randn(40, 3, seed=2).square())
    assert math.isfinite(moments.fit(0.01))


@pytest.mark.parametrize("options", [{"scale": "paper"}, {"active": 0.5}, {"backend": "reference"}])
def test_weights_of_another_setting_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """The tensors are alike; but gates of the other scale, or other numbers of heads, are not what was trained."""
    settings = {"router": "learned", "shared": 0.25}
    patch(tiny("Llama"), **settings).save_weights(tmp_path)
    handle = patch(tiny("Llama"), **{**settings, **options})
    if "backend" in options:  # which is no part of what was trained
        handle.load_weights(tmp_path)
        return
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"the patch of {name}={value!r}: attn_plugins.load"):
        handle.load_weights(tmp_path)
