"""Methods with weights of their own: on the model, in its files, in an optimizer, and off again."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.methods.trained_agent import AgentAttention
from tests.support.snapshot import snapshot
from tests.support.tiny import randn
from tests.support.tiny_vision import MODELS, SIZES, build, features, inputs, item

FREE = ("SigLIP 2", "Qwen2-VL", "Qwen3-VL")  # made for pictures of any size
NAMES = [name for name in MODELS if name not in FREE]
SOME = pytest.mark.parametrize("name", ["ViT", "DeiT", "DINOv2", "CLIP"])


def patch(model: Any, **options: Any) -> attn_plugins.PatchHandle:
    return attn_plugins.patch(model, "trained_agent", **{"agents": 4, **options})


def trained(model: Any, **options: Any) -> attn_plugins.PatchHandle:
    """Patched, and with weights that are not zero any more."""
    handle = patch(model, **options)
    for seed, (_, weight) in enumerate(handle.named_weights()):
        weight.data = 0.4 * randn(*weight.shape, seed=seed)
    return handle


@pytest.mark.parametrize("name", NAMES)
def test_exact_undo(name: str) -> None:
    patch(build(name))  # what is registered once stays (patching.GLOBALS)
    model, given = build(name), inputs(name, 2)
    dense, keys = features(name, model, given), list(model.state_dict())
    before, hidden, state = snapshot(model), dict(vars(model.config)), torch.get_rng_state()
    handle = patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    plain = features(name, model, given)
    assert not torch.allclose(plain, dense, atol=1e-3)
    assert patch(model) is handle
    for seed, (_, weight) in enumerate(handle.named_weights()):
        weight.data = 0.4 * randn(*weight.shape, seed=seed)
    assert not torch.allclose(features(name, model, given), plain, atol=1e-3)
    attn_plugins.unpatch(model)
    assert snapshot(model) == before and vars(model.config) == hidden and list(model.state_dict()) == keys
    assert torch.equal(features(name, model, given), dense)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_by_one_line(name: str, tmp_path: Any) -> None:
    model, given = build(name), inputs(name, 2)
    trained(model)
    want = features(name, model, given)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = attn_plugins.from_pretrained(tmp_path, type(model)).eval()
    assert torch.equal(features(name, loaded, given), want)
    assert "trained_agent" in attn_plugins.summary(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = attn_plugins.from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(model) and torch.equal(features(name, again, given), want)
    dense = copy.deepcopy(model)
    attn_plugins.unpatch(dense)
    attn_plugins.unpatch(loaded)
    assert torch.equal(features(name, loaded, given), features(name, dense, given))
    assert not hasattr(loaded.config, "attn_plugins")


@SOME
def test_a_batch_gives_what_its_items_give_at_two_sizes(name: str) -> None:
    model = build(name)
    trained(model)
    for size in (0, 1):
        given = inputs(name, 2, size)
        for index, part in enumerate(features(name, model, given).chunk(2)):
            torch.testing.assert_close(part, features(name, model, item(given, index)), rtol=1e-4, atol=5e-5)


@SOME
def test_a_patched_layer_is_the_layer_of_the_authors_form(name: str) -> None:
    model = build(name)
    handle = trained(model)
    first = handle.patches[0].layers[0].name
    attention = model.get_submodule(first)
    before = MODELS[name].before
    alone = AgentAttention(32, 2, grid=(4, 4), agents=4, own_tokens=before, std=0)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    state = attention.trained_agent.state_dict()
    for part in ("weight", "bias"):
        state[f"qkv.{part}"] = torch.cat([getattr(projection, part) for projection in projections])
    last = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    alone.load_state_dict({**state, "proj.weight": last.weight, "proj.bias": last.bias})
    seen: list[Any] = []
    attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args or kwargs, out[0])), with_kwargs=True
    )
    features(name, model, inputs(name, 2))
    given, out = seen[0]
    x = given[0] if isinstance(given, tuple) else given["hidden_states"]
    torch.testing.assert_close(alone(x), out, rtol=1e-4, atol=1e-5)


def test_the_parameters_are_the_papers() -> None:
    """Table 1: Agent-DeiT-T; its own weights are 298,224 of them."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
    )
    model = ViTForImageClassification(config)
    handle = attn_plugins.patch(model, "trained_agent")
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_015_640
    assert sum(weight.numel() for _, weight in handle.named_weights()) == 298_224
    assert "weights of its own: 298,224" in handle.summary()
    assert dict(handle.named_weights()).items() <= dict(model.named_parameters()).items()


def test_weights_alone_go_to_a_folder_and_back(tmp_path: Any) -> None:
    model, given = build("DeiT"), inputs("DeiT", 2)
    handle = trained(model)
    want = features("DeiT", model, given)
    handle.save_weights(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attn_plugins.json", "attn_plugins.safetensors"]
    other = build("DeiT")
    again = attn_plugins.load(other, tmp_path)
    assert torch.equal(features("DeiT", other, given), want)
    assert again.patches[0].config == handle.patches[0].config
    for _, weight in again.named_weights():
        weight.data.zero_()
    again.load_weights(tmp_path)
    assert torch.equal(features("DeiT", other, given), want)
    again.remove()
    with pytest.raises(ValueError, match="not patched any more"):
        again.load_weights(tmp_path)


def test_what_does_not_belong_is_told(tmp_path: Any) -> None:
    trained(build("ViT")).save_weights(tmp_path / "vit")
    with pytest.raises(ValueError, match="is of models of 'vit'"):
        attn_plugins.load(build("DeiT"), tmp_path / "vit")
    model = build("ViT")
    handle = patch(model, kernel=0)
    with pytest.raises(ValueError, match=r"lacks 0 tensors and has 4 that the patch has not \(layers.0.attention: dwc"):
        handle.load_weights(tmp_path / "vit")
    handle.remove()
    handle = patch(model, layers=[1])
    with pytest.raises(ValueError, match=r"has 1 that the patch has not \(layers.0.attention, "):
        handle.load_weights(tmp_path / "vit")
    handle.remove()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="holds no weights of a method"):
        attn_plugins.load(model, tmp_path / "dense")
    handle = attn_plugins.patch(model, "gna", window=2)
    with pytest.raises(ValueError, match="'gna' has no weights to save"):
        handle.save_weights(tmp_path / "gna")
    handle.remove()
    row = json.loads((tmp_path / "vit" / "attn_plugins.json").read_text())
    row[0]["sites"] = ["layers.7.attention"]
    (tmp_path / "vit" / "attn_plugins.json").write_text(json.dumps(row))
    before = snapshot(model)
    with pytest.raises(ValueError, match="no layer 'layers.7.attention'"):
        attn_plugins.load(model, tmp_path / "vit")
    assert snapshot(model) == before


def test_a_load_that_fails_leaves_no_patch(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    trained(build("ViT")).save_weights(tmp_path)
    tensors = load_file(tmp_path / "attn_plugins.safetensors")
    tensors.pop("layers.1.attention.trained_agent.ac_bias")
    save_file(tensors, tmp_path / "attn_plugins.safetensors")
    model = build("ViT")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(layers.1.attention: ac_bias"):
        attn_plugins.load(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize("model", FREE)
def test_models_of_any_size_are_refused_before_anything_changes(model: str) -> None:
    built = build(model)
    before = snapshot(built)
    with pytest.raises(ValueError, match="does not tell the sizes of its attention layers"):
        patch(built)
    assert snapshot(built) == before


def test_families_that_tell_no_sizes_are_refused(quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS as DIFFUSERS

    with pytest.raises(ValueError, match="'trained_agent' brings weights for each layer: .* does not tell the sizes"):
        attn_plugins.patch(DIFFUSERS["pixart"].build(), "trained_agent")


def test_two_settings_on_two_layers_come_and_go_by_themselves(tmp_path: Any) -> None:
    model, given = build("ViT"), inputs("ViT", 1)
    dense = features("ViT", model, given)
    first, second = trained(model, layers=[0]), trained(model, layers=[1], agents=9)
    assert [row["sites"] for row in model.config.attn_plugins] == [["layers.0.attention"], ["layers.1.attention"]]
    both = features("ViT", model, given)
    model.save_pretrained(tmp_path)
    loaded = attn_plugins.from_pretrained(tmp_path).eval()
    assert torch.equal(features("ViT", loaded, given), both)
    first.remove()
    assert [row["options"] for row in model.config.attn_plugins] == [{"agents": 9}]
    assert not torch.equal(features("ViT", model, given), both)
    second.remove()
    assert not hasattr(model.config, "attn_plugins") and torch.equal(features("ViT", model, given), dense)


def test_a_name_that_is_taken_is_told_and_nothing_is_left() -> None:
    model = build("ViT")
    model.layers[1].attention.trained_agent = "somebody's"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.1.attention has an attribute 'trained_agent' already"):
        patch(model)
    assert snapshot(model) == before


def test_a_copy_and_a_pickle_have_weights_of_their_own() -> None:
    model, given = build("DINOv2"), inputs("DINOv2", 1)
    dense = features("DINOv2", model, given)
    handle = trained(model)
    want = features("DINOv2", model, given)
    twin, buffer = copy.deepcopy(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    thawed = torch.load(buffer, weights_only=False)
    for _, weight in handle.named_weights():
        weight.data.zero_()
    attn_plugins.unpatch(model)
    for other in (twin, thawed):
        assert torch.equal(features("DINOv2", other, given), want)
        attn_plugins.unpatch(other)
        assert torch.equal(features("DINOv2", other, given), dense)
        assert not hasattr(other.config, "attn_plugins")


def test_weights_follow_the_model_to_its_precision_and_mode() -> None:
    model = build("ViT").to(torch.bfloat16).train()
    handle = patch(model)
    assert {weight.dtype for _, weight in handle.named_weights()} == {torch.bfloat16}
    assert model.layers[0].attention.trained_agent.training
    model.float()
    assert {weight.dtype for _, weight in handle.named_weights()} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_new_weights_alone_can_be_trained(autocast: bool) -> None:
    model, given = build("ViT").train(), inputs("ViT", 2)
    model.requires_grad_(False)
    handle = patch(model)
    weights = [weight for _, weight in handle.named_weights()]
    frozen = copy.deepcopy({name: t for name, t in model.state_dict().items() if "trained_agent" not in name})
    optimizer = torch.optim.Adam(weights, lr=0.02)
    goal = randn(2, 17, 32, seed=5)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (model(**given)[0].float() - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(weight.abs().max() > 0 for weight in weights)
    assert all(torch.equal(t, frozen[name]) for name, t in model.state_dict().items() if name in frozen)


def test_peft_trains_a_lora_beside_them(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model, given = build("ViT"), inputs("ViT", 2)
    handle = trained(model)
    names_before = [name for name, _ in handle.named_weights()]
    want = features("ViT", model, given)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["trained_agent"])
    wrapped = peft.get_peft_model(model, config)
    torch.testing.assert_close(features("ViT", wrapped, given), want)
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert any("trained_agent" in name for name in names) and any("lora_A" in name for name in names)
    wrapped(**given)[0].square().mean().backward()
    reached = [
        name for name, p in wrapped.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()
    ]
    assert any("trained_agent.modules_to_save.default.an_bias" in name for name in reached)
    # what is saved and loaded is what runs, under the names that it has without PEFT
    assert [name for name, _ in handle.named_weights()] == names_before
    dict(handle.named_weights())[names_before[0]].data.mul_(2)
    changed = features("ViT", wrapped, given)
    assert not torch.allclose(changed, want, atol=1e-4)
    handle.save_weights(tmp_path)
    other = build("ViT")
    attn_plugins.load(other, tmp_path)
    torch.testing.assert_close(features("ViT", other, given), changed)
    dict(handle.named_weights())[names_before[0]].data.zero_()
    handle.load_weights(tmp_path)
    torch.testing.assert_close(features("ViT", wrapped, given), changed)


def test_compiles_whole() -> None:
    model = build("ViT")
    trained(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in (0, 1):
        given = inputs("ViT", 2, size)
        torch.testing.assert_close(
            features("ViT", compiled, given), features("ViT", model, given), rtol=1e-4, atol=5e-5
        )


def test_lost_weights_leave_a_call_dense_with_one_warning() -> None:
    model, given = build("ViT"), inputs("ViT", 1)
    dense = features("ViT", model, given)
    patch(model)
    for block in model.layers:
        del block.attention.trained_agent
    with pytest.warns(UserWarning, match="lost its agents' weights"):
        assert torch.equal(features("ViT", model, given), dense)


def test_a_base_that_is_sized_otherwise_takes_what_can_be_resized(tmp_path: Any) -> None:
    """Lines of biases of one resolution serve a model that is made for another."""
    from transformers import ViTConfig, ViTModel

    trained(build("ViT")).save_weights(tmp_path)
    larger = ViTModel(ViTConfig(**{**SIZES, "image_size": 64})).eval()
    handle = attn_plugins.load(larger, tmp_path)
    shapes = {name: tuple(weight.shape) for name, weight in handle.named_weights()}
    assert shapes["layers.0.attention.trained_agent.ah_bias"] == (1, 2, 4, 8, 1)
    assert larger(pixel_values=randn(1, 3, 64, 64))[0].isfinite().all()
