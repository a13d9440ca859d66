"""Upcycling vision transformers: what is in the files, what they may be called, what is refused, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

from attn_plugins.models.bam import of
from attn_plugins.models.bam.layout import source_of
from attn_plugins.pipelines import upcycle_bam
from attn_plugins.pipelines.cli import app
from attn_plugins.pipelines.upcycle.options import UpcycleSettings
from tests.pipelines.test_upcycle import settings, tensors
from tests.support.bam import MODES, dense_vit, pixels

READS = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}


@pytest.mark.parametrize("mode", MODES)
def test_means_are_exact_and_every_expert_is_there_bit_by_bit(mode: str, tmp_path: Path) -> None:
    models = [dense_vit(seed) for seed in range(3)]
    found = upcycle_bam.upcycle(settings(tmp_path, models, mode), tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    states = [one.state_dict() for one in models]
    kinds = {"mean": 0, "experts": 0, "router": 0}
    for key, tensor in tensors(tmp_path / "out").items():
        source = source_of(key, tuple(tensor.shape), of("vit"), model.config)
        kinds[source.kind] += 1
        if source.kind == "mean":
            mean = torch.stack([state[source.names[0]].double() for state in states]).sum(0) / 3
            assert torch.equal(tensor, mean.float()), key
        elif source.kind == "experts":
            again = torch.full_like(tensor, float("nan"))
            for number, state in enumerate(states):
                source.place(again, number, [state[name] for name in source.names])
            assert torch.equal(tensor, again), key
    assert min(kinds.values()) > 0
    assert found.parameters == model.num_parameters() and found.parameters_dense == models[0].num_parameters()
    # no cache; one token of 17: all that it is multiplied by, and its scores
    added, head = 17 * 32 + 32, 5 * 33
    scores = 2 * 4 * 32 * 17
    assert (found.kv_bytes, found.context) == (0, 17)
    assert found.flops_dense == 2 * (found.parameters_dense - added - head) + scores
    assert found.flops == 2 * (found.parameters_active - added - head) + scores * (1 if mode == "mean" else 3)
    assert not any("KV cache" in line for line in found.lines()) and "of a picture's 17" in found.lines()[-1]


def test_tensors_may_go_by_their_new_names_and_without_the_prefix(tmp_path: Path) -> None:
    """Files have the names that ViT's modules had before transformers 5, and transformers reads both."""
    models = [dense_vit(seed) for seed in range(2)]
    told = settings(tmp_path, models)
    upcycle_bam.upcycle(told, tmp_path / "old")
    path = tmp_path / "expert-1" / "model.safetensors"
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(path)
    save_file({name: tensor.contiguous() for name, tensor in models[1].state_dict().items()}, path, {"format": "pt"})
    upcycle_bam.upcycle(told, tmp_path / "new")
    state = {name.removeprefix("vit."): tensor.contiguous() for name, tensor in models[1].state_dict().items()}
    save_file(state, path, {"format": "pt"})
    upcycle_bam.upcycle(told, tmp_path / "bare")
    old = tensors(tmp_path / "old")
    for other in ("new", "bare"):
        found = tensors(tmp_path / other)
        assert found.keys() == old.keys() and all(torch.equal(found[name], old[name]) for name in old)


def test_what_pictures_are_read_with_comes_along(tmp_path: Path) -> None:
    told = settings(tmp_path, [dense_vit(seed) for seed in range(2)])
    for number in range(2):
        text = json.dumps({**READS, "feature_extractor_type": number})  # who reads them is nothing that differs
        (tmp_path / f"expert-{number}" / "preprocessor_config.json").write_text(text)
    upcycle_bam.upcycle(told, tmp_path / "out")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("labels", "has id2label = .*'cat'.*"),
        ("pixels", "preprocessor_config.json differs from .*a pixel means the same to every expert"),
        ("prompts", "router_init: hidden reads prompts, and ViT models read pictures: give random"),
        ("body", "has no classifier.weight: it is no whole ViTForImageClassification"),
        ("size", "has image_size = 64"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path, change: str, match: str) -> None:
    models = [dense_vit(), dense_vit(1, **({"image_size": 64} if change == "size" else {}))]
    options: dict[str, Any] = {}
    if change == "labels":
        models[1].config.id2label = {**models[1].config.id2label, 0: "cat"}
    if change == "prompts":
        options = {"router_init": "hidden", "base_prompts": ("a",)}
    if change == "body":
        models[1].classifier = torch.nn.Identity()
    told = settings(tmp_path, models)
    if options:
        expert = type(told.experts[0])(told.experts[0].source, "e1", ("b",))
        told = UpcycleSettings(told.base_model, (expert,), **options)
    for number in range(2 if change == "pixels" else 0):
        path = tmp_path / f"expert-{number}" / "preprocessor_config.json"
        path.write_text(json.dumps({**READS, "image_std": [0.5 + number] * 3}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=match):
        upcycle_bam.upcycle(told, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_how_experts_were_trained_is_nothing_they_have_to_agree_in(tmp_path: Path) -> None:
    models = [dense_vit(), dense_vit(1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)]
    models[1](pixels(), labels=torch.tensor([0, 1]))
    assert models[1].config.problem_type == "single_label_classification" and models[0].config.problem_type is None
    upcycle_bam.plan(settings(tmp_path, models))


def test_the_command(tmp_path: Path) -> None:
    settings(tmp_path, [dense_vit(seed) for seed in range(2)])
    recipe = tmp_path / "mix.yml"
    recipe.write_text("base_model: expert-0\nexperts:\n  - {source_model: expert-1, name: photographs}\n")
    result = CliRunner().invoke(app, ["upcycle", str(recipe), str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "attn_plugins_bam_vit: 2 experts (base, photographs)" in result.output
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.expert_names == ["base", "photographs"]
