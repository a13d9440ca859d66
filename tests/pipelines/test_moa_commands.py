"""`attn-plugins moa-search` and `moa-evaluate`, end to end, as someone types them."""

from __future__ import annotations

import argparse
import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from attn_plugins.methods.moa import load_plan
from attn_plugins.pipelines.cli import app


def run(*arguments: object, code: int = 0) -> str:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_search_then_evaluate(tmp_path):
    text = ("--text", argparse.__file__, "--device", "cpu")
    sizes = ("--length", 256, "--length", 384, "--rows", 1, "--validation-rows", 1, "--density", 0.6)
    said = run("moa-search", *sizes, *text, "--seed", 5, "--influence", "pairs", "--out", tmp_path)
    plan = load_plan(tmp_path / "plan.json")
    assert plan.model == "small_llama" and plan.provenance["seed"] == 5 and plan.density(384) <= 0.6
    assert f"384 tokens: {plan.density(384):.1%} of the cache" in said and str(tmp_path / "plan.json") in said
    assert json.loads((tmp_path / "search.json").read_text())["settings"]["influence"] == "pairs"
    sizes = ("--window", 256, "--windows", 2, "--length", 256, "--trials", 1, "--decode", 4)
    said = run("moa-evaluate", *sizes, *text, "--search", tmp_path, "--out", tmp_path / "report")
    for name in ("dense", "searched", "per layer", "uniform", "streaming", "duo"):
        assert f"| {name} |" in said
    assert "static cache:" in said and "plan cache:" in said
    assert {"evaluation.md", "evaluation.csv"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_what_a_user_can_mend_is_one_line(tmp_path):
    assert "no config.json there" in run("moa-search", tmp_path, code=2)
    assert "run attn-plugins moa-search --out" in run("moa-evaluate", "--search", tmp_path, code=2)
    assert "density=2.0" in run("moa-search", "--density", 2, code=2)
