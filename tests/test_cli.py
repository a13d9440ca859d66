"""The command line: every command says what the library says, and what a user can mend is one line and exit code 2."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from attn_plugins import presets, registry, simulate
from attn_plugins.pipelines.cli import app
from attn_plugins.pipelines.commands.look import field_docs
from attn_plugins.pipelines.commands.values import options, per_axis, sizes
from attn_plugins.pipelines.comparing.measure_files import can_plot

HUNYUAN = ["simulate", "--grid", "30x48x80", "--window", "18x24x24", "--q-tile", "4x8x8", "--kv-tile", "2x8x8"]


def run(*arguments: str, code: int = 0):
    """The outcome of a command, in a terminal wide enough that no cell is folded."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_no_command_shows_the_commands():
    text = CliRunner().invoke(app, [], env={"COLUMNS": "200"}).output
    order = [text.index(f" {name} ") for name in ("list", "show", "families", "env", "simulate", "demo", "compare")]
    assert order == sorted(order)


def test_list_names_every_method_with_its_paper():
    text = run("list").output
    for name in registry.method_names():
        assert name in text and registry.method(name).paper in text


def test_show_gives_options_meanings_and_presets():
    text = run("show", "gna").output
    for word in ("window", "stride", "dilation", "causal"):
        assert re.search(rf"│ {word}\s+│[^│]+│[^│]+│ \w", text), f"{word} has no meaning in the table"
    for file in presets.available("gna"):
        assert file.name in text


def test_show_of_an_unknown_method_names_the_nearest():
    result = run("show", "gnaa", code=2)
    assert "gnaa" in result.stderr and "gna" in result.stderr.replace("gnaa", "")
    assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) == 1


def test_debug_keeps_the_traceback():
    result = CliRunner().invoke(app, ["--debug", "show", "gnaa"])
    assert result.exit_code == 1 and isinstance(result.exception, (ValueError, LookupError))


def test_families_lists_every_family():
    text = run("families").output
    assert all(family.name in text and family.title in text for family in registry.families())


def test_env_reports_versions_and_backends():
    import torch

    text = run("env").output
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", text, re.M)
    assert re.search(r"^backends +reference, cpu", text, re.M) and re.search(r"^attn-plugins +\d", text, re.M)


def test_simulate_gives_the_published_figures():
    """arXiv 2504.16922: HunyuanVideo, stride 1 gives 3.27x and stride 16x8x8 gives 11.1x; 91% sparse."""
    assert "3.27x" in run(*HUNYUAN).output
    assert "11.11x" in run(*HUNYUAN, "--stride", "16x8x8").output


def test_simulate_passes_every_setting_on():
    arguments = ["--grid", "12x20", "--window", "6x8", "--stride", "2x4", "--dilation", "2x1", "--causal", "1x0"]
    text = run("simulate", *arguments, "--q-tile", "2x4", "--kv-tile", "2x2", "--dynamic").output
    row = simulate(
        grid=(12, 20), window=(6, 8), stride=(2, 4), dilation=(2, 1), causal=(True, False),
        q_tile=(2, 4), kv_tile=(2, 2), dynamic=True,
    )  # fmt: skip
    assert f"{row.visited} of {row.total}" in text and f"{row.speedup:.2f}x" in text and "dynamic" in text


def test_simulate_ranks_strides_and_estimates_end_to_end():
    text = run(*HUNYUAN, "--useful-strides", "--share", "0.6").output
    speeds = [float(found) for found in re.findall(r"of 900 +│ +([\d.]+)x", text)]
    assert len(speeds) > 3 and speeds[1:] == sorted(speeds[1:], reverse=True)
    assert "2.50x" in text, "the bound 1 / (1 - 0.6) stands beside the estimate"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stride", "40"], ("stride", "40")),
        (["--causal", "1x0"], ("causal", "3 axes")),
        (["--grid", "30,48"], ("30,48", "30x48x80")),
        (["--share", "1.5"], ("1.5", "0..1")),
    ],
)
def test_simulate_refuses_in_one_line(arguments, words):
    error = run(*HUNYUAN, *arguments, code=2).stderr
    assert all(word in error for word in words) and len(error.strip().splitlines()) == 1


def test_values():
    assert sizes("grid", "30x48x80") == (30, 48, 80) and sizes("window", "-1x8") == (-1, 8)
    assert per_axis("stride", "4", 3) == (4, 4, 4)
    read = options(["window=18x24x24", "small-grid=error", "causal=[true, false]", "temperature=0.5", "stride=2"])
    assert read == {
        "window": (18, 24, 24), "small_grid": "error", "causal": [True, False], "temperature": 0.5, "stride": 2,
    }  # fmt: skip


@pytest.mark.parametrize("pairs", [["window"], ["=3"], ["window=3", "window=4"]])
def test_values_refuse(pairs):
    with pytest.raises(ValueError, match="--option"):
        options(pairs)


def test_field_docs_reads_google_style_arguments():
    text = """A config.

    Args:
        window: keys per axis,
            -1 is the whole axis.
        stride, dilation: per axis: both.

    Raises:
        ValueError: never.
    """
    told = {
        "window": "keys per axis, -1 is the whole axis.",
        "stride": "per axis: both.",
        "dilation": "per axis: both.",
    }
    assert field_docs(text) == told


def test_demo_writes_its_table_and_pictures(tmp_path):
    pytest.importorskip("diffusers")
    arguments = ["--frames", "4", "--steps", "2", "-o", "window=4x8x8", "-o", "dense_steps=0", "--seed", "1"]
    text = run("demo", *arguments, "--digits", "37,04", "--out", str(tmp_path / "pictures")).output
    words = ("step", "attention in a step", "of at most", "density", "drift", "PSNR", "dense again", "seed 1")
    for word in (*words, "bit-identical", "recall", "oracle", "rel. L1", "blocks.5.attn1", "least recall"):
        assert word in text, f"{word!r} is missing from the tables"
    assert re.search(r"PSNR +│ equal", text), "dense against dense with one seed is the noise floor"
    written = {path.name for path in (tmp_path / "pictures").iterdir()} - {"demo_gna_steps.png"}
    reports = {f"demo.{kind}" for kind in ("html", "csv", "json")}
    assert written == {"demo_gna.gif", "demo_gna.png", "demo_gna_layers.csv", "demo_gna_steps.csv", *reports}
    plotted = (tmp_path / "pictures" / "demo_gna_steps.png").exists()
    assert plotted == can_plot() and ("it needs matplotlib" in text) != plotted


def test_demo_refuses_in_one_line(tmp_path):
    pytest.importorskip("diffusers")
    error = run("demo", "--digits", "3x", "--out", str(tmp_path), code=2).stderr
    assert "3x" in error and "pairs of digits" in error
    assert "windw" in run("demo", "-o", "windw=3", "--out", str(tmp_path), code=2).stderr


def test_compare_refuses_before_it_loads(tmp_path):
    assert "model_index.json" in run("compare", str(tmp_path), "gna", code=2).stderr
    assert "gnaa" in run("compare", str(tmp_path), "gna", "gnaa", code=2).stderr
    (tmp_path / "model_index.json").write_text("{}")
    assert "float33" in run("compare", str(tmp_path), "gna", "--dtype", "float33", code=2).stderr


def test_compare_runs_a_pipeline_from_disk(tmp_path):
    pytest.importorskip("diffusers")
    from tests.support import tiny_pipelines

    tiny_pipelines.build("flux").save_pretrained(tmp_path / "tiny")
    call = ["--steps", "3", "--height", "32", "--width", "32", "-a", "max_sequence_length=16", "--prompt", "a cat"]
    patch = ["-o", "window=4x4", "-o", "dense_steps=1", "-o", "min_tokens=1"]
    call += ["--measures", "0", "--out", str(tmp_path / "out")]
    text = run("compare", str(tmp_path / "tiny"), "gna", *call, *patch).output
    assert "gna on FluxPipeline: 3 steps" in text and re.search(r"dense steps +│ 3 of 3 +│ 1 of 3", text)
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"tiny_gna_steps.png"} == {
        "tiny.html",
        "tiny.csv",
        "tiny.json",
        "tiny_gna.png",
        "tiny_gna_steps.csv",
    }
    assert "recall" not in text
    error = run("compare", str(tmp_path / "tiny"), "gna", "--frames", "3", "--steps", "1", code=2).stderr
    assert "num_frames" in error
