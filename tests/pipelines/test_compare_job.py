"""From a folder and options to a comparison: what a model is, what it takes, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_plugins.pipelines import demo_model, small_llama
from attn_plugins.pipelines.cli import app
from attn_plugins.pipelines.comparing import inputs
from attn_plugins.pipelines.comparing.job import Request
from attn_plugins.pipelines.comparing.loading import locate


def run(*arguments: object, code: int = 0):
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, ["compare", *words], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def error(*arguments: object) -> str:
    text = run(*arguments, code=2).stderr
    lines = [line for line in text.splitlines() if line.startswith("error: ")]  # the libraries may show bars before
    assert len(lines) == 1 and text.rstrip().endswith(lines[0]), text
    return lines[0]


def saved(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_model_is(tmp_path):
    assert (locate("small_llama").kind, locate("moving_digits").kind) == ("language", "pipeline")
    assert locate(str(demo_model.asset_folder())) == locate("moving_digits")
    assert locate(str(small_llama.asset_folder())).embedded == "small_llama"
    vit = locate(str(saved(tmp_path / "vit", architectures=["ViTForImageClassification"])))
    assert (vit.kind, vit.name, vit.embedded) == ("classifier", "vit", "")


def test_what_is_no_model(tmp_path, monkeypatch):
    assert "neither model_index.json nor config.json" in error(tmp_path, "gna")
    assert "no such folder" in error(tmp_path / "none", "gna")
    assert "FluxTransformer2DModel by itself" in error(
        saved(tmp_path / "part", _class_name="FluxTransformer2DModel"), "gna"
    )
    assert "BertForMaskedLM" in error(saved(tmp_path / "bert", architectures=["BertForMaskedLM"]), "gna")
    broken = saved(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert "is no JSON" in error(broken, "gna")


def test_a_name_on_the_hub_offline(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = error("nobody/no-such-model", "gna")
    assert "nobody/no-such-model is no folder here" in text and "hub cannot be reached" in text
    assert "no folder here" in error("not a name", "gna")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("small_llama", "moa:span=0.5", "--prompt", "a"), ("--prompt is for a diffusers pipeline", "language model")),
        (("small_llama", "moa:span=0.5", "--prompts", "a"), ("--prompts is for", "language model")),
        (("moving_digits", "gna", "--text", "a"), ("--text is for a language model", "diffusers pipeline")),
        (("moving_digits", "gna", "--prompt-tokens", "9"), ("--prompt-tokens is for",)),
        (("moving_digits", "gna", "--dtype", "float33"), ("float33",)),
        (("moving_digits", "gnaa"), ("gnaa", "gna")),
        (("moving_digits", "gna:window"), ("no NAME=VALUE",)),
    ],
)
def test_refused_before_anything_is_loaded(arguments, words, monkeypatch, tmp_path):
    monkeypatch.setattr("attn_plugins.pipelines.comparing.loading.load", None)
    text = error(*arguments, "--out", tmp_path)
    assert all(word in text for word in words) and not list(tmp_path.iterdir())


def test_every_option_belongs_to_one_kind():
    from attn_plugins.pipelines.comparing.job import OF

    names = [name for row in OF.values() for name in row]
    assert sorted(names) == sorted(vars(Request()))
    assert Request(seeds=(1,)).check("pipeline") is None


def test_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# animals\na cat\n\na dog \na cat\n")
    assert inputs.prompts(["a bird"], file, "x") == ["a bird", "a cat", "a dog"]
    assert inputs.prompts([], None, "x") == ["x"]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no prompts there"):
        inputs.prompts([], file, "x")
    with pytest.raises(FileNotFoundError, match="no such file"):
        inputs.prompts([], tmp_path / "none", "x")


def test_a_language_model_by_the_command(tiny_llama, tmp_path):
    (tmp_path / "mine.txt").write_text("a line of text, and another\n" * 40)
    given = ("--text", tmp_path / "mine.txt", "--window", 64, "--rows", 2, "--tokens", 2, "--prompt-tokens", 32)
    text = run(tiny_llama, "moa:span=0.5,block=16", "moba:block=16", *given, "--out", tmp_path / "out").output
    for word in ("moba:block=16, bound:", "perplexity", "text: mine.txt", "prefill", "top-1"):
        assert word in text, f"{word!r} is missing from what is printed"
    assert (tmp_path / "out" / f"{tiny_llama.name}.html").is_file()


def test_the_embedded_pipeline_by_the_command(tmp_path):
    pytest.importorskip("diffusers")
    given = ("--prompt", "37", "--frames", 2, "--steps", 1, "--measures", 0, "--out", tmp_path)
    text = run("moving_digits", "gna:window=2x8x8,dense_steps=0", *given).output
    assert "prompt: 37" in text and "gna:window=2x8x8,dense_steps=0 on WanPipeline" in text
    assert {"moving_digits.html", "moving_digits_gna_window_2x8x8_dense_steps_0.gif"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "3x" in error("moving_digits", "gna", "--prompt", "3x", "--out", tmp_path)
    assert "leave --height" in error("moving_digits", "gna", "--height", 64, "--out", tmp_path)
