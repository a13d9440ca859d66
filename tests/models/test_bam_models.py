"""A mixture as a model of transformers: caches, padding, saving, adapters, compilation, checkpointing, registration."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import attn_plugins
from attn_plugins.models import bam
from attn_plugins.models.bam import modeling_attn_plugins_bam
from tests.support.bam import MODES, NAMES, dense, error, ids, mixture, routers

ROOT = Path(attn_plugins.__file__).resolve().parent.parent
CLOSE = 2e-6
LIKE_LLAMA = ("llama", "gpt_neox")  # one of each kind of attention, where all seven would say the same


def tokens(model, inputs, **options):
    told = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **told)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(name, mode):
    model = mixture(name, mode)
    cached = tokens(model, ids(), use_cache=True)
    assert torch.equal(cached, tokens(model, ids(), use_cache=False))
    prompt = model(cached[:, :8], use_cache=True)
    parts = [
        prompt.logits,
        *(model(cached[:, n : n + 1], past_key_values=prompt.past_key_values).logits for n in (8, 9)),
    ]
    whole = model(cached[:, :10]).logits
    assert error(torch.cat(parts, 1), whole) < CLOSE
    assert error(torch.cat(parts[:2] + parts[1:2], 1), whole) > 1e-3


@pytest.mark.parametrize("name", LIKE_LLAMA)
@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache_gives_the_same_tokens(name, mode):
    model = mixture(name, mode)
    told = {"disable_compile": True, "cache_implementation": "static"}
    assert torch.equal(tokens(model, ids(), **told), tokens(model, ids()))


@pytest.mark.parametrize("name", NAMES)
def test_shared_keys_and_values_have_the_dense_cache(name):
    shapes = {}
    for mode in MODES:
        cache = mixture(name, mode)(ids(), use_cache=True).past_key_values
        shapes[mode] = [tuple(layer.keys.shape) for layer in cache.layers]
    cache = dense(name)(ids(), use_cache=True).past_key_values
    wanted = [tuple(layer.keys.shape) for layer in cache.layers]
    assert shapes["shared_kv"] == shapes["mean"] == wanted
    assert shapes["all_params"] == [(b, 3 * h, *rest) for b, h, *rest in wanted]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_changes_nothing(name, mode):
    model = mixture(name, mode)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids()], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = model(ids()).logits
    assert error(model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], wanted) < CLOSE
    assert error(model(padded, position_ids=positions).logits[:, 3:], wanted) > 1e-3
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    alone = [tokens(model, row[None])[0, 9:13] for row in ids()]
    assert torch.equal(batch[:, 12:], torch.stack(alone))


@pytest.mark.parametrize("mode", ["all_params", "shared_kv"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_any_attention_implementation_gives_the_same(name, mode):
    model = mixture(name, mode)
    wanted = model(ids()).logits
    model.set_attn_implementation("eager")
    found = model(ids(), output_attentions=True)
    assert error(found.logits, wanted) < CLOSE
    assert [weights.shape for weights in found.attentions] == [(2, 12, 9, 9)] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_every_bit(name, mode, tmp_path):
    model = mixture(name, mode)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model) and loaded.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    # Equal weights at other addresses: PyTorch's products differ in the last bit, as they do for any reloaded model.
    assert error(loaded.eval()(ids()).logits, model(ids()).logits) < CLOSE


def test_the_body_loads_alone(tmp_path):
    model = mixture("llama")
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert type(body).__name__ == "AttnPluginsBamLlamaModel"
    assert error(model.lm_head(body(ids()).last_hidden_state), model(ids()).logits) < CLOSE


def python(code: str, *arguments: object) -> list[str]:
    """The lines that it prints, in a process of its own that has nothing in its cache of remote code."""
    run = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(arguments[0])}
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


CLASS = "AttnPluginsBamLlamaForCausalLM"


def test_it_loads_where_attn_plugins_is_imported_first_and_nothing_waits_on(tmp_path):
    mixture("llama").save_pretrained(tmp_path / "model")
    code = """
import sys, attn_plugins
ours = lambda: sum("attn_plugins" in type(finder).__module__ for finder in sys.meta_path)
print(ours())
from transformers import AutoModelForCausalLM
from transformers.models.auto import configuration_auto as configs
print(ours(), "attn_plugins_bam_phi" in configs.CONFIG_MAPPING, type(configs.__loader__).__name__)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")).__name__)
print("transformers.models.phi.modeling_phi" in sys.modules, "attn_plugins.patching" in sys.modules)"""
    assert python(code, tmp_path) == ["1", "0 True SourceFileLoader", CLASS, "False False"]


def test_it_loads_from_the_file_beside_it_and_where_transformers_is_imported_first(tmp_path):
    mixture("llama").save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("*.py")] == ["modeling_attn_plugins_bam.py"]
    code = """
import sys
from transformers import AutoModelForCausalLM
assert "attn_plugins" not in sys.modules
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True)).__name__)
import attn_plugins
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")).__name__)"""
    assert python(code, tmp_path) == [CLASS, CLASS]


def test_the_file_that_loads_it_is_pushed_along(monkeypatch):
    """Of the Hub there is a stand-in: what would be uploaded."""
    import huggingface_hub

    uploaded = {}

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    info = type("RepoUrl", (), {"repo_id": "someone/mixture"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: info)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_branch", lambda self, *args, **options: None)
    model = mixture("llama")
    model.push_to_hub("someone/mixture")
    assert {"config.json", "model.safetensors", "modeling_attn_plugins_bam.py"} <= uploaded.keys()
    told = json.loads(uploaded["config.json"])["auto_map"]["AutoModelForCausalLM"]  # file.class
    assert told == f"modeling_attn_plugins_bam.{CLASS}"
    assert uploaded["modeling_attn_plugins_bam.py"] == Path(modeling_attn_plugins_bam.__file__).read_bytes()


def test_classes_are_found_by_name_and_pickled():
    import pickle

    assert bam.AttnPluginsBamPhiForCausalLM is bam.named_class("AttnPluginsBamPhiForCausalLM")
    config = pickle.loads(pickle.dumps(mixture("phi").config))
    assert type(config) is bam.AttnPluginsBamPhiConfig
    with pytest.raises(AttributeError, match="no class 'AttnPluginsBamGemma"):
        bam.named_class("AttnPluginsBamGemmaConfig")


@pytest.mark.parametrize(
    ("option", "value", "legal"),
    [("num_experts", 0, "1 or more"), ("num_experts_per_tok", 3, "1 to 2"), ("expert_gate", "half", "'unit', 'paper'")],
)
def test_a_config_says_what_is_legal(option, value, legal):
    with pytest.raises(ValueError, match=f"{option}={value!r}.*{legal}"):
        AutoConfig.for_model("attn_plugins_bam_llama", **{option: value})


PAPER = {  # bam.md: the 590M shape, N = 4
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_hidden_layers": 6, "vocab_size": 256_000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "count"), [("mean", 700_480_512), ("all_params", 776_002_560), ("shared_kv", 738_253_824)]
)
def test_parameters_are_the_papers(mode, count):
    with torch.device("meta"):
        seed = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **PAPER))
        told = {"num_experts": 4, "attention_experts": mode, **PAPER}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("attn_plugins_bam_cohere", **told))
    assert seed.num_parameters() == 587_209_728
    assert model.num_parameters() == count


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_lora_trains_projections_and_saves_routers(name, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = mixture(name, "shared_kv")
    base = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["router"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    assert error(adapted(ids()).logits, base(ids()).logits) > 1e-3
    adapted.train()(ids(), labels=ids()).loss.backward()
    trained = [key for key, weight in adapted.named_parameters() if weight.grad is not None]
    assert sum("router" in key for key in trained) == 4 and sum("mix.o_proj.lora" in key for key in trained) == 4
    with torch.no_grad():
        for router in routers(adapted):
            router.weight += 1 * router.weight.requires_grad
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again.eval()(ids()).logits, adapted.eval()(ids()).logits)
    assert tokens(again, ids()).shape == (2, 15)


def test_it_compiles_whole():  # with shared KV: test_bam_routing.py, in training
    torch._dynamo.reset()
    model = mixture("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits) < CLOSE


@pytest.mark.parametrize("mode", ["all_params", "shared_kv"])
def test_other_methods_patch_a_mixture_as_they_do_its_dense_model(mode):
    model = mixture("llama", mode)
    wanted, generated = model(ids()).logits, tokens(model, ids())
    with attn_plugins.patched(model, "moa", span=1.0) as handle:
        assert len(handle.patches[0].layers) == 2
        assert error(model(ids()).logits, wanted) < CLOSE
        assert torch.equal(tokens(model, ids()), generated)
    assert torch.equal(model(ids()).logits, wanted)
