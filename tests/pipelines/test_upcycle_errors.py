"""What is wrong with experts is said before a byte is written; and what the command and its YAML say."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from attn_plugins.pipelines import upcycle_bam
from attn_plugins.pipelines.cli import app
from attn_plugins.pipelines.upcycle.options import UpcycleSettings
from attn_plugins.pipelines.upcycle.writer import alone
from tests.pipelines.test_upcycle import settings
from tests.support.bam import dense, saved

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "bam"


@pytest.fixture
def told(tmp_path):
    return settings(tmp_path, [dense("llama", seed) for seed in range(2)])


def refused(told, tmp_path, kind, match):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=match):
        upcycle_bam.upcycle(told, tmp_path / "new" / "out")
    assert sorted(tmp_path.rglob("*")) == before  # no folder, no file
    return True


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("qwen3", {}, "is a qwen3 and .* a llama"),
        ("llama", {"intermediate_size": 64}, "has intermediate_size = 64, and .* has 48"),
        ("llama", {"vocab_size": 65}, "has vocab_size = 65, and .* has 64"),
        ("llama", {"rms_norm_eps": 1e-5}, "has rms_norm_eps = 1e-05"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "has rope_parameters = .*500000"),
        ("llama", {"tie_word_embeddings": True}, "has tie_word_embeddings = True"),
    ],
)
def test_another_architecture_is_refused(told, tmp_path, name, more, match):
    shutil.rmtree(tmp_path / "expert-1")
    saved(dense(name, 1, **more), tmp_path / "expert-1")
    refused(told, tmp_path, ValueError, match)


def test_another_tokenizer_is_refused_and_another_padding_is_not(told, tmp_path):
    base = {"model": {"vocab": {"a": 0, "b": 1}}, "padding": None}
    (tmp_path / "expert-0" / "tokenizer.json").write_text(json.dumps(base))
    (tmp_path / "expert-1" / "tokenizer.json").write_text(json.dumps({**base, "padding": {"direction": "Left"}}))
    upcycle_bam.plan(told)
    (tmp_path / "expert-1" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 0}}}))
    refused(told, tmp_path, ValueError, "tokenizer.json differs from")


@pytest.mark.parametrize(
    ("file", "one", "same", "other"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": {"merges": ["a b", "c d"]}, "added_tokens": []}',
         '{"model": {"merges": [["a", "b"], ["c", "d"]]}}', '{"model": {"merges": ["c d", "a b"]}}'),
        ("vocab.json", '{"a": 0, "b": 1}', '{\n  "b": 1,\n  "a": 0\n}\n', '{"a": 1, "b": 0}'),
        ("merges.txt", "#version: 0.2\na b\nc d\n", "a b\r\nc d", "c d\na b\n"),
    ],
)  # fmt: skip
def test_a_tokenizer_is_compared_by_what_it_says(told, tmp_path, file, one, same, other):
    (tmp_path / "expert-0" / file).write_text(one)
    (tmp_path / "expert-1" / file).write_text(same)
    upcycle_bam.plan(told)
    (tmp_path / "expert-1" / file).write_text(other)
    refused(told, tmp_path, ValueError, f"{file} differs from")


@pytest.mark.parametrize("damaged", ["{", "[]", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(told, tmp_path, damaged):
    (tmp_path / "expert-0" / "tokenizer.json").write_text("{}")
    (tmp_path / "expert-1" / "tokenizer.json").write_text(damaged)
    refused(told, tmp_path, ValueError, "expert-1/tokenizer.json cannot be read")


def test_identical_experts_are_refused_without_the_flag(told, tmp_path):
    state = load_file(tmp_path / "expert-0" / "model.safetensors")
    state["model.norm.weight"] += 1  # not routed: the experts are still the same
    save_file(state, tmp_path / "expert-1" / "model.safetensors", {"format": "pt"})
    refused(told, tmp_path, ValueError, "the same expert twice.*allow_identical: true")
    state["model.layers.1.mlp.down_proj.bias"][-1] += 1e-3  # the last number of the last routed tensor
    save_file(state, tmp_path / "expert-1" / "model.safetensors", {"format": "pt"})
    upcycle_bam.plan(told)
    upcycle_bam.plan(UpcycleSettings(told.base_model, (told.experts[0],) * 2, allow_identical=True))


def test_experts_that_differ_in_precision_alone_are_identical(told, tmp_path):
    model = dense("llama").to(torch.bfloat16)
    saved(model, tmp_path / "expert-1")
    saved(model.float(), tmp_path / "expert-0")
    refused(told, tmp_path, ValueError, "the same expert twice")


def test_a_missing_shard_is_refused(told, tmp_path):
    dense("llama", 1).save_pretrained(tmp_path / "expert-1", max_shard_size="20KB")
    (tmp_path / "expert-1" / "model.safetensors").unlink(missing_ok=True)
    upcycle_bam.plan(told)
    sorted((tmp_path / "expert-1").glob("*.safetensors"))[1].unlink()
    refused(told, tmp_path, ValueError, "model-00002-of.* is missing")


@pytest.mark.parametrize("left", [-4, 40, 3, 0])
def test_a_truncated_shard_is_refused(told, tmp_path, left):
    path = tmp_path / "expert-1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(told, tmp_path, ValueError, "model.safetensors is truncated")


@pytest.mark.parametrize("header", [b"[]", b'{"a": true}', b'{"a": {}}', b"{"])
def test_a_header_that_says_nothing_is_refused(told, tmp_path, header):
    path = tmp_path / "expert-1" / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(told, tmp_path, ValueError, "model.safetensors is no safetensors file")


def test_a_shard_with_more_than_its_header_says_is_refused(told, tmp_path):
    path = tmp_path / "expert-1" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refused(told, tmp_path, ValueError, "model.safetensors is damaged")


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_says_nothing_is_refused(told, tmp_path, index):
    (tmp_path / "expert-1" / "model.safetensors.index.json").write_text(index)
    refused(told, tmp_path, ValueError, "index.json does not say which shard has what")


@pytest.mark.parametrize("left", ["a file", "nothing", "{"])
def test_an_unfinished_run_that_cannot_be_told_is_refused(told, tmp_path, left):
    work = tmp_path / "new" / "out.unfinished"
    work.parent.mkdir()
    if left == "a file":
        work.write_text("mine")
    else:
        work.mkdir()
        if left == "{":
            (work / upcycle_bam.STATE).write_text(left)
    refused(told, tmp_path, ValueError, "none that can be told: remove it first")


@pytest.mark.parametrize("begun", [False, True])
def test_two_runs_at_once_do_not_write_the_same_files(told, tmp_path, begun):
    pytest.importorskip("fcntl")
    upcycle_bam.upcycle(told, tmp_path / "alone", shard=20_000)
    if begun:
        with pytest.raises(KeyboardInterrupt):
            upcycle_bam.upcycle(told, tmp_path / "out", shard=20_000, tick=interrupted)
    refusals = []

    def second(what, amount):
        if not refusals:
            with pytest.raises(ValueError, match="out.unfinished: another run is writing there") as refusal:
                upcycle_bam.upcycle(told, tmp_path / "out", shard=20_000)
            refusals.append(refusal)

    upcycle_bam.upcycle(told, tmp_path / "out", shard=20_000, tick=second)
    assert refusals
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def interrupted(what, amount):
    raise KeyboardInterrupt


def test_a_run_that_comes_when_another_has_just_finished_is_told(tmp_path, monkeypatch):
    """It had opened the folder before it got its name, and waited no longer than that."""
    fcntl = pytest.importorskip("fcntl")
    work = tmp_path / "out.unfinished"
    work.mkdir()
    monkeypatch.setattr(fcntl, "flock", lambda held, how: work.rename(tmp_path / "out"))
    with pytest.raises(ValueError, match="another run has finished there"), alone(work):
        pass


def test_all_is_on_the_disk_before_the_mixture_has_its_name(told, tmp_path, monkeypatch):
    flushed, named = set(), []
    fsync, replace = os.fsync, os.replace

    def noted(file):
        flushed.add(os.fstat(file).st_ino)
        fsync(file)

    def renamed(source, target):
        if Path(target) == tmp_path / "out":
            named.extend(path.name for path in [*Path(source).iterdir(), Path(source)])
            assert {path.stat().st_ino for path in [*Path(source).iterdir(), Path(source)]} <= flushed
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    upcycle_bam.upcycle(told, tmp_path / "out", shard=20_000)
    assert {"config.json", "model.safetensors.index.json", "upcycle.json"} <= set(named)


def test_a_home_is_found(told, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = UpcycleSettings.of({"base_model": "~/expert-0", "experts": [{"source_model": "~/expert-1"}]})
    assert (read.base_model, read.experts[0].source) == (told.base_model, told.experts[0].source)
    assert read.experts[0].name == "expert-1" and upcycle_bam.plan(read).report.experts == ("base", "expert-1")
    with pytest.raises(ValueError, match="base_model='~nobody-of-that-name/x'"):
        UpcycleSettings.of({"base_model": "~nobody-of-that-name/x", "experts": [{"source_model": "a"}]})


def test_a_tensor_that_is_not_there_is_refused(told, tmp_path):
    path = tmp_path / "expert-1" / "model.safetensors"
    state = load_file(path)
    gone = state.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(state, path)
    refused(told, tmp_path, ValueError, "has no model.layers.1.self_attn.q_proj.weight")
    save_file({**state, "model.layers.1.self_attn.q_proj.weight": gone[:-8].clone()}, path)
    refused(told, tmp_path, ValueError, r"has shape \(24, 32\), and its config makes it \(32, 32\)")


def test_pickles_are_refused_and_not_read(told, tmp_path):
    path = tmp_path / "expert-1" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    refused(told, tmp_path, ValueError, r"pickles \(pytorch_model.bin\).*refused")


def test_quantised_models_and_no_models_are_refused(told, tmp_path):
    config = tmp_path / "expert-1" / "config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "quantization_config": {"quant_method": "fp8"}}))
    refused(told, tmp_path, ValueError, "is quantised")
    config.unlink()
    refused(told, tmp_path, ValueError, "no config.json there")
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "expert-0")
    refused(told, tmp_path, ValueError, "expert-0: model_type 'gpt2': BAM mixes llama, qwen2")


def test_a_name_that_is_not_to_be_had_is_refused(told, tmp_path):
    refused(UpcycleSettings("nobody/nothing", told.experts), tmp_path, ValueError, "neither a folder nor to be had")
    refused(UpcycleSettings("./nothing", told.experts), tmp_path, ValueError, "there is no such folder")


def test_a_folder_that_exists_is_refused(told, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists"):
        upcycle_bam.upcycle(told, out)
    assert [path.name for path in out.iterdir()] == ["mine"] and not (tmp_path / "out.unfinished").exists()


def test_a_full_disk_is_refused(told, tmp_path, monkeypatch):
    size = upcycle_bam.plan(told).size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(size, 1, size - 1))
    refused(told, tmp_path, OSError, "the mixture needs 0.00 GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(size, 0, size))
    upcycle_bam.upcycle(told, tmp_path / "new" / "out")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "moe"}, "method='moe': legal are bam, btx, sparse_upcycle"),
        ({"attention": {"experts": "kv"}}, "attention.experts='kv': legal are all_params, shared_kv"),
        ({"attention": {"router": "top1"}}, "attention.router='top1': legal are soft"),
        ({"method": "btx", "attention": {"experts": "shared_kv"}}, "attention is for method: bam"),
        ({"ffn": {"top_k": 3}}, "ffn.top_k=3: legal are 1 to 2"),
        ({"ffn": {"topk": 3}}, "ffn has an unknown key 'topk'; legal are top_k, gate"),
        ({"merge": "slerp"}, "merge='slerp': legal are mean"),
        ({"router_init": "hidden"}, "needs positive_prompts of every expert.*base has none"),
        ({"experts": []}, "bam takes a list of experts"),
        ({"experts": [{"model": "a"}]}, r"experts\[0\] has an unknown key 'model'"),
        ({"method": "sparse_upcycle"}, "give num_experts, and neither experts"),
        ({"dtype": "int8"}, "dtype='int8': legal are"),
        ({"base_model": None, "speed": 1}, "the file has an unknown key 'speed'"),
        ({"base_model": None}, "base_model=None: give a folder"),
        ({"experts": 3}, "experts=3: give a list"),
        ({"experts": [{"source_model": ["a"]}]}, r"experts\[0\].source_model=\['a'\]: give a folder"),
        ({"experts": [{"source_model": "b", "positive_prompts": "def f"}]}, "positive_prompts='def f': give a list of"),
        ({"base_prompts": "hello"}, "base_prompts='hello': give a list of texts"),
        ({"base_prompts": [1]}, r"base_prompts=\[1\]: give a list of texts"),
        ({"ffn": {"top_k": "1"}}, "ffn.top_k='1': give a whole number"),
        ({"ffn": {"top_k": 1.5}}, "ffn.top_k=1.5: give a whole number"),
        ({"seed": "x"}, "seed='x': give a whole number"),
        ({"seed": 2**32}, "seed=4294967296: give a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed=-1: give a whole number"),
        ({"method": "sparse_upcycle", "experts": None, "num_experts": "4"}, "num_experts='4': give a whole number"),
        ({"losses": 0}, "losses is 0: it has to have the keys balance, z"),
        ({"losses": {"balance": "1e-2"}}, "losses.balance='1e-2': .* write 1.0e-2"),
        ({"losses": {"z": -1}}, "losses.z=-1: give a number of 0 or more"),
        ({"attention": []}, r"attention is \[\]: it has to have the keys"),
        ({"include_base": "no"}, "include_base='no': legal are true, false"),
        ({"allow_identical": "false"}, "allow_identical='false': legal are true, false"),
    ],
)
def test_a_yaml_says_what_is_legal(change, match):
    with pytest.raises(ValueError, match=match):
        UpcycleSettings.of({"base_model": "a", "experts": [{"source_model": "b"}], **change})


def test_the_examples_are_legal():
    read = {path.stem: UpcycleSettings.of_file(path) for path in CONFIGS.glob("*.yaml")}
    assert len(read) >= 4 and {told.method for told in read.values()} == {"bam", "btx", "sparse_upcycle"}
    assert read["three_llamas"].members[1].prompts and read["shared_kv"].attention == "shared_kv"


def run(*arguments: object, code: int = 0):
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, ["upcycle", *map(str, arguments)], env=environment)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command(tmp_path):
    for number in range(2):
        saved(dense("phi", number), tmp_path / f"m{number}")
    recipe = tmp_path / "mix.yml"
    recipe.write_text("base_model: m0\nexperts:\n  - {source_model: m1, name: code}\nattention: {experts: shared_kv}\n")
    said = run(recipe, tmp_path / "out", "--dry-run").stdout
    assert "2 experts (base, code), method bam, attention shared_kv" in said and not (tmp_path / "out").exists()
    said = run(recipe, tmp_path / "out", "--shard-size", 5e-5).stdout
    assert f"parameters {upcycle_bam.plan(UpcycleSettings.of_file(recipe)).report.parameters:,}" in said
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() and str(tmp_path / "out") in said
    assert "exists" in run(recipe, tmp_path / "out", code=2).stderr
    recipe.write_text("base_model: m0\nexperts:\n  - source_model: m0\n")
    assert "the same expert twice" in run(recipe, tmp_path / "two", code=2).stderr
    run(recipe, tmp_path / "two", "--allow-identical")
    assert "no such file" in run(tmp_path / "none.yml", tmp_path / "three", code=2).stderr
