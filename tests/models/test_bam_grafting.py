"""Attention experts in a loaded model: what they compute, and that taking them out leaves no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import attn_plugins
from attn_plugins.models.bam.attention import ExpertOutput
from attn_plugins.models.bam.grafting import graft_experts
from tests.support.bam import MODES, NAMES, dense, error, expert, ids, loud, mixed, mixture, routers

CLOSE = 2e-6


@pytest.mark.parametrize("mode", ["all_params", "shared_kv"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_what_upcycling_makes_of_the_attention(name, mode):
    base = dense(name)
    others = [expert(base, 1), expert(base, 2)]
    for other in others:  # all else is the base's, so that a mixture differs by nothing but its attention
        state = {key: value for key, value in base.state_dict().items() if ".mlp." in key}
        other.load_state_dict(state, strict=False)
    model = loud(mixed([base, *others], mode))
    wanted, before = base(ids()).logits, {key: value.clone() for key, value in base.state_dict().items()}
    random = torch.get_rng_state()
    graft = graft_experts(base, others, attention=mode)
    assert torch.equal(torch.get_rng_state(), random)
    for mine, its in zip(routers(base), attention_routers(model), strict=True):
        mine.weight.copy_(its.weight)
    found = base(ids()).logits
    assert error(found, model(ids()).logits) < CLOSE and error(found, wanted) > 1e-3
    told = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(base.generate(ids(), **told), base.generate(ids(), use_cache=False, **told))
    graft.remove()
    graft.remove()
    assert torch.equal(base(ids()).logits, wanted)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def attention_routers(model):
    return [module.router for module in model.modules() if isinstance(module, ExpertOutput)]


def test_what_is_done_to_the_model_meanwhile_is_done_to_what_stands_aside():
    base = dense("llama").train()
    wanted = copy.deepcopy(base).bfloat16().eval()(ids()).logits
    attn_plugins.patch(base, "bam", experts=[expert(base, 1)])
    base.bfloat16().eval()
    attn_plugins.unpatch(base)
    assert not any(module.training for module in base.modules())
    assert torch.equal(base(ids()).logits, wanted)


def test_a_model_of_another_library_is_refused():
    model = torch.nn.Linear(2, 2)
    model.config = {"_class_name": "DiTTransformer2DModel"}  # as diffusers' configs, without a model_type
    with pytest.raises(ValueError, match="model_type 'Linear': BAM mixes llama"):
        graft_experts(model, [model])


def test_a_precision_of_ones_own_within_an_attention_is_kept():
    base = dense("qwen3").bfloat16()
    norm = base.model.layers[0].self_attn.q_norm.float()
    before = norm.weight.clone()
    graft_experts(base, [dense("qwen3", 1).bfloat16()]).remove()
    assert norm.weight.dtype == torch.float32 and torch.equal(norm.weight, before)


def test_equal_experts_change_nothing_whatever_the_attention_implementation():
    base = dense("qwen3")
    wanted = base(ids()).logits
    graft = graft_experts(base, [dense("qwen3")] * 2)
    assert error(base(ids()).logits, wanted) < CLOSE
    base.set_attn_implementation("eager")
    assert base(ids(), output_attentions=True).attentions[0].shape == (2, 12, 9, 9)
    base.train()(ids(), labels=ids()).loss.backward()
    assert len(graft.parameters()) > 10 and all(weight.grad is not None for weight in graft.parameters())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: [], "experts is empty"),
        (lambda: [dense("phi")], "is a PhiAttention: LlamaAttention is wanted"),
        (lambda: [dense("llama", num_hidden_layers=1)], "an expert of 1 layers, for a model of 2"),
        (lambda: [dense("llama", num_key_value_heads=1)], "another shape than the model's"),
        (lambda: [mixture("llama", MODES[0])], "LlamaAttention is wanted"),
        (lambda: [torch.nn.Linear(2, 2)], "Linear is no Llama model"),
    ],
)
def test_other_models_are_refused_and_nothing_is_changed(make, match):
    base = dense("llama")
    with pytest.raises(ValueError, match=match):
        graft_experts(base, make())
    assert type(base.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_patch_puts_them_in_and_unpatch_takes_them_out():
    base, others = dense("llama"), [expert(dense("llama"), 1)]
    wanted = base(ids()).logits
    handle = attn_plugins.patch(base, "bam", experts=others, attention="shared_kv", seed=3)
    twice = {"experts": [copy.deepcopy(others[0])], "attention": "shared_kv", "seed": 3}
    assert attn_plugins.patch(base, "bam", **twice) is handle and handle.active
    with pytest.raises(ValueError, match="is patched by 'bam'"):
        attn_plugins.patch(base, "bam", **{**twice, "experts": [expert(dense("llama"), 2)]})
    found = base(ids()).logits
    assert error(found, wanted) > 1e-3
    assert "bam on LlamaForCausalLM" in attn_plugins.summary(base)
    for again in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert error(again(ids()).logits, found) < CLOSE
        attn_plugins.unpatch(again, "bam")
        assert error(again(ids()).logits, wanted) < CLOSE
    assert torch.equal(base(ids()).logits, found)  # the copies' undo is the copies'
    attn_plugins.unpatch(base)
    assert torch.equal(base(ids()).logits, wanted) and not handle.active
    with attn_plugins.patched(base, "bam", experts=others):
        assert error(base(ids()).logits, wanted) > 1e-3
    assert torch.equal(base(ids()).logits, wanted) and "is not patched" in attn_plugins.summary(base)


def test_it_is_not_saved_and_says_what_to_do(tmp_path):
    """No class loads what it would write: wide attentions in a dense model's folder."""
    base = dense("llama")
    before = set(vars(base))
    attn_plugins.patch(base, "bam", experts=[expert(base, 1)])
    for one in (base, copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        with pytest.raises(
            ValueError, match=r"cannot be loaded again; call attn_plugins.unpatch\(model, 'bam'\) first"
        ):
            one.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        attn_plugins.unpatch(one)
        one.save_pretrained(tmp_path / "dense")
    assert set(vars(base)) == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert error(loaded(ids()).logits, base(ids()).logits) < CLOSE


def test_patches_over_it_come_out_first_and_under_it_are_refused():
    base, others = dense("llama"), [expert(dense("llama"), 1)]
    attn_plugins.patch(base, "bam", experts=others)
    found = base(ids()).logits
    attn_plugins.patch(base, "moa", span=1.0)
    assert error(base(ids()).logits, found) < CLOSE
    with pytest.raises(ValueError, match="another patch is on the attention experts"):
        attn_plugins.unpatch(base, "bam")
    attn_plugins.unpatch(base)
    assert "is not patched" in attn_plugins.summary(base)
    attn_plugins.patch(base, "moa", span=1.0)
    with pytest.raises(ValueError, match="is patched by 'moa'"):
        attn_plugins.patch(base, "bam", experts=others)


@pytest.mark.parametrize(
    ("told", "kind", "match"),
    [
        ({"experts": []}, ValueError, "experts is empty"),
        ({"experts": ["models/code"]}, ValueError, "an expert is a str: give loaded models"),
        ({"layers": [0]}, ValueError, r"layers=\[0\]: 'bam' takes options of its own alone"),
        ({"dense_steps": 3}, ValueError, "dense_steps=3"),
        ({"sed": 1}, TypeError, "unknown option 'sed'.*did you mean 'seed'"),
        ({"attention": "both"}, ValueError, "attention='both': legal are 'all_params', 'shared_kv'"),
    ],
)
def test_patch_says_what_bam_takes(told, kind, match):
    base = dense("llama")
    with pytest.raises(kind, match=match):
        attn_plugins.patch(base, "bam", **{"experts": [base], **told})
    assert "is not patched" in attn_plugins.summary(base)
