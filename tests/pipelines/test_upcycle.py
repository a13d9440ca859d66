"""Upcycling: what is in the mixture's files, how much memory that took, and runs that were interrupted."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attn_plugins.models.bam import of
from attn_plugins.models.bam.layout import source_of
from attn_plugins.pipelines import upcycle_bam
from attn_plugins.pipelines.small_llama import asset_folder
from attn_plugins.pipelines.upcycle.options import Expert, UpcycleSettings
from tests.support.bam import MODES, NAMES, dense, error, ids, saved


def settings(folder: Path, models: list, mode: str = "all_params", **options) -> UpcycleSettings:
    paths = [saved(model, folder / f"expert-{number}") for number, model in enumerate(models)]
    method = "btx" if mode == "mean" else "bam"
    rest = tuple(Expert(path, f"e{n}") for n, path in enumerate(paths[1:], 1))
    return UpcycleSettings(paths[0], rest, method, attention=mode, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_means_are_exact_and_every_expert_is_there_bit_by_bit(name, mode, dtype, tmp_path):
    models = [dense(name, seed) for seed in range(3)]
    upcycle_bam.upcycle(settings(tmp_path, models, mode, dtype=dtype), tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    states = [model.state_dict() for model in models]
    kinds = {"mean": 0, "experts": 0, "router": 0}
    for key, tensor in tensors(tmp_path / "out").items():
        source = source_of(key, tuple(tensor.shape), of(name), config)
        kinds[source.kind] += 1
        assert tensor.dtype == getattr(torch, dtype)
        if source.kind == "mean":
            seen = [source.picked(state[source.names[0]]).double() for state in states]
            mean = (torch.stack(seen).sum(0) / 3).float()
            assert torch.equal(tensor, mean.to(tensor.dtype)), key
        elif source.kind == "experts":
            again = torch.full_like(tensor, float("nan"))
            for number, state in enumerate(states):
                source.place(again, number, [state[dense_name] for dense_name in source.names])
            assert torch.equal(tensor, again), key  # and so no place was left out, and none was written twice
    assert min(kinds.values()) > 0


def test_the_mean_of_equal_tensors_is_the_tensor(tmp_path):
    base = dense("llama")
    upcycle_bam.upcycle(settings(tmp_path, [base] * 3, "mean", allow_identical=True), tmp_path / "out")
    state, found = base.state_dict(), tensors(tmp_path / "out")
    shared = [name for name in found if name in state]
    assert len(shared) > 10 and all(torch.equal(found[name], state[name]) for name in shared)
    thirds = torch.rand(1000)
    assert not torch.equal((thirds + thirds + thirds) / 3, thirds)  # in float32 it need not be


def test_sparse_upcycling_copies_one_model(tmp_path):
    base = dense("llama")
    told = UpcycleSettings(saved(base, tmp_path / "base"), method="sparse_upcycle", attention="mean", num_experts=4)
    found = upcycle_bam.upcycle(told, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert found.experts == ("copy 0", "copy 1", "copy 2", "copy 3") and model.config.num_experts == 4
    assert error(model(ids()).logits, base(ids()).logits) < 2e-6


def test_the_report_counts_what_is_there(tmp_path):
    models = [dense("mistral", seed) for seed in range(3)]
    found = {}
    for mode in MODES:
        told = settings(tmp_path / mode, models, mode, dtype="bfloat16")
        found[mode] = upcycle_bam.upcycle(told, tmp_path / mode / "out")
        assert json.loads((tmp_path / mode / "out" / "upcycle.json").read_text()) == json.loads(
            json.dumps(found[mode].to_dict())
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / mode / "out")
        assert (
            found[mode].parameters
            == model.num_parameters()
            == sum(t.numel() for t in tensors(tmp_path / mode / "out").values())
        )
        cache = model(ids(1, 4), use_cache=True).past_key_values
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2 // 4
        assert found[mode].kv_bytes == held
        one_layer = 3 * 32 * 48
        assert found[mode].parameters - found[mode].parameters_active == 2 * 2 * one_layer
    assert found["mean"].parameters_dense == models[0].num_parameters()
    attention = {mode: found[mode].parameters - found["mean"].parameters for mode in MODES}
    assert attention["all_params"] == 2 * (2 * (32 * 32 * 2 + 32 * 16 * 2) + 3 * 32)  # two more experts, a router
    assert attention["shared_kv"] == 2 * (2 * 32 * 32 * 2 + 3 * 32)
    routed = [found[mode].routed_tensors for mode in ("mean", "shared_kv", "all_params")]
    assert routed == [4, 8, 12]
    flops = found["all_params"]
    assert flops.flops_dense == 2 * (flops.parameters_dense - 64 * 32) + 2 * 4 * 32 * flops.context


def peak(run) -> int:
    """Bytes by which the process grew at most while `run` ran, mapped files included."""
    gc.collect()
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would be filled first, unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pytest.skip("this system does not reset the peak of a process' memory")
    read = lambda key: int(status.read_text().split(f"{key}:")[1].split()[0]) * 1024  # noqa: E731
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def test_three_models_take_less_memory_than_two_of_them(tmp_path):
    big = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 1024,
    }
    models = [dense("llama", seed, **big) for seed in range(3)]
    told = settings(tmp_path, models)
    size = sum(tensor.numel() * 4 for tensor in models[0].state_dict().values())
    del models
    held: list[torch.Tensor] = []
    two = peak(
        lambda: held.extend(tensor.clone() for n in range(2) for tensor in tensors(tmp_path / f"expert-{n}").values())
    )
    held.clear()
    assert two > 1.9 * size  # the measure sees models
    found = peak(lambda: upcycle_bam.upcycle(told, tmp_path / "out", shard=8 * size))  # all in one file
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert found < 2 * size, f"{found / size:.2f} models"


class Stop(Exception):
    pass


def stopping(after: int):
    """A tick that fails when so many bytes were written."""
    written = 0

    def tick(what: str, amount: int) -> None:
        nonlocal written
        written += amount
        if written > after:
            raise Stop

    return tick


def test_a_run_that_was_interrupted_goes_on_and_gives_the_same_bytes(tmp_path):
    told = settings(tmp_path, [dense("qwen3", seed) for seed in range(3)])
    plan, out = upcycle_bam.plan(told), tmp_path / "out"
    upcycle_bam.upcycle(told, tmp_path / "whole", shard=60_000)
    with pytest.raises(Stop):
        upcycle_bam.upcycle(told, out, shard=60_000, tick=stopping(plan.size // 2))
    work = tmp_path / "out.unfinished"
    assert not out.exists() and list(work.glob("*.part"))
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert 0 < len(done) < len(list((tmp_path / "whole").glob("*.safetensors")))
    other = UpcycleSettings(told.base_model, told.experts, seed=1)
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        upcycle_bam.upcycle(other, out, shard=60_000)
    ticks = []
    upcycle_bam.upcycle(told, out, shard=60_000, tick=lambda what, amount: ticks.append(amount))
    assert sum(ticks) == plan.size and not work.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done  # not written again
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_a_run_does_not_go_on_when_an_expert_changed(tmp_path):
    models = [dense("llama", seed) for seed in range(2)]
    told = settings(tmp_path, models)
    with pytest.raises(Stop):
        upcycle_bam.upcycle(told, tmp_path / "out", shard=20_000, tick=stopping(60_000))
    saved(dense("llama", 5), tmp_path / "expert-1")
    with pytest.raises(ValueError, match="unfinished run"):
        upcycle_bam.upcycle(told, tmp_path / "out", shard=20_000)


def test_the_tokenizer_comes_along_and_the_embedded_model_is_upcycled(tmp_path):
    """A real model: its perplexity on text stays what it was, and the mixture generates what it does."""
    seed = AutoModelForCausalLM.from_pretrained(asset_folder(), dtype=torch.float32).eval()
    told = UpcycleSettings(
        str(asset_folder()), (Expert(str(asset_folder()), "again"),), allow_identical=True, dtype="float32"
    )
    upcycle_bam.upcycle(told, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("import os\n\ndef main():\n    ", return_tensors="pt")
    prompt.pop("token_type_ids", None)
    assert error(model(**prompt).logits, seed(**prompt).logits) < 5e-6
    found = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, seed.generate(**prompt, max_new_tokens=12, do_sample=False))


def test_tensors_may_go_by_other_names(tmp_path):
    """GPT-NeoX's head is called embed_out in files, and bodies are saved without their prefix."""
    models = [dense("gpt_neox", seed) for seed in range(2)]
    told = settings(tmp_path, models)
    upcycle_bam.upcycle(told, tmp_path / "new")
    path = tmp_path / "expert-1" / "model.safetensors"
    state = load_file(path)
    assert "embed_out.weight" in state  # transformers saves it under the old name, and reads both
    state["lm_head.weight"] = state.pop("embed_out.weight")
    save_file({name.removeprefix("gpt_neox."): tensor for name, tensor in state.items()}, path, {"format": "pt"})
    upcycle_bam.upcycle(told, tmp_path / "old")
    new, old = tensors(tmp_path / "new"), tensors(tmp_path / "old")
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)


def test_routers_that_were_made_from_prompts_know_them(tmp_path):
    folder = str(asset_folder())
    code, digits = ("def main(self):\n        return self.value",), ("4719 2280 5531 0042 1187 3936",)
    told = UpcycleSettings(
        folder, (Expert(folder, "digits", digits),), base_prompts=code, router_init="hidden", allow_identical=True,
        dtype="float32",
    )  # fmt: skip
    upcycle_bam.upcycle(told, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    from attn_plugins.models.bam.watching import watch_routers

    loads = []
    for text in ("def build(self):\n        return self.name", "9313 2718 4464 1592"):
        watch = watch_routers(model)
        model(tokenizer(text, return_tensors="pt")["input_ids"])
        rows = [row.load[1] for row in watch.rows() if row.name.endswith("mlp")]
        loads.append(sum(rows) / len(rows))
        watch.close()
    assert loads[0] < 0.3 and loads[1] > 0.7
