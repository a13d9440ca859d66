"""Every command in the documentation is one: it runs, or, where that takes minutes, its own parser takes it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from attn_plugins.pipelines.cli import app  # noqa: E402
from tests.support.pages import PAGES, ROOT, blocks  # noqa: E402

# these are done within moments, and are run; of the others the options are read
QUICK = ("list", "show", "families", "env", "simulate")
BASH = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
COMMANDS = sorted({command for block in BASH for command in block.commands})
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class Parsed(Exception):
    """A script's parser has taken its arguments."""


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = re.sub(r"\$\([^)]*\)", "", command)  # what another command would fill in
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # settings of the environment
        words = words[1:]
    if not words or words[0] in ("for", "cd", "export"):
        for inner in re.findall(r"attn-plugins [^;]+", command):
            parse(shlex.split(inner)[1:])
        return
    if words[0] == "attn-plugins":
        if words[1] in QUICK:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, result.output
        parse(words[1:])
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    elif words[0] == "pip":
        for extras in re.findall(r"\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= EXTRAS.keys()
    elif words[0] in ("python", "accelerate") and "-m" not in words[:3]:
        script = next(word for word in words if word.endswith(".py"))
        read_arguments(ROOT / script, words[words.index(script) + 1 :], monkeypatch)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
    else:
        assert (ROOT / words[0]).is_file(), f"{words[0]}: neither a command of ours nor a file"


def parse(words: list[str]) -> None:
    """Read a command's options; nothing runs."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    arguments = [re.sub(r"\$\w+", "1", word) for word in words[1:]]  # a shell's variables are numbers here
    context = command.make_context(words[0], arguments)
    assert context.params is not None


def read_arguments(script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to the moment when its own parser has read its arguments."""
    plain = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        plain(self, words, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    spec = importlib.util.spec_from_file_location("a_script_of_the_documentation", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    with pytest.raises(Parsed), contextlib.suppress(SystemExit):
        module.main()
