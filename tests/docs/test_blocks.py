"""Every block of Python in the documentation runs, page by page, on small models in the place of the reader's."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
import yaml

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attn_plugins import registry  # noqa: E402
from tests.support.pages import PAGES, Block, blocks, indented  # noqa: E402
from tests.support.pages_stage import HUB, namespace  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

LANGUAGES = {"python", "bash", "yaml", "toml", "text"}
# Minutes of work, which another test does with small settings; here names and signatures alone are held.
LONG = {
    "search(model, tokenizer": "tests/pipelines/test_moa_search.py",
    "compare(pipe": "tests/pipelines/test_compare.py",
    "upcycle(UpcycleSettings": "tests/pipelines/test_upcycle.py",
}
# the README's block is run as a user would, elsewhere
PYTHON = {
    page: [block for block in blocks(page) if block.language == "python"] for page in PAGES if page.name != "README.md"
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names on the hub are folders here."""
    from transformers import PreTrainedModel

    plain = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: type, name: Any, *arguments: Any, **settings: Any) -> Any:
        return plain(cls, tmp_path / HUB[name] if name in HUB else name, *arguments, **settings)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


@pytest.mark.parametrize("page", [page for page in PYTHON if PYTHON[page]], ids=lambda page: page.name)
def test_python_runs(page: Path, hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))  # pages may register methods
    torch.manual_seed(0)
    names = namespace(page.name, tmp_path)
    for block in PYTHON[page]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pages show settings for large grids, which small ones may not honour
            run(block, names)


def run(block: Block, names: dict[str, Any]) -> None:
    """Execute a block, statement by statement, so that a failure names its line of the page."""
    tree = ast.parse(block.text)
    for statement in tree.body:
        where = f"{block.page}:{block.line + statement.lineno}"
        source = ast.get_source_segment(block.text, statement) or ""
        if any(text in source for text in LONG):
            unknown = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - names.keys()
            assert not {name for name in unknown if name not in ("found", "report")}, where
            return
        try:
            exec(compile(ast.Module([statement], []), where, "exec"), names)
        except Exception as error:
            pytest.fail(f"{where}: {source.splitlines()[0]}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert not indented(page), "give these lines a fence and a language"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_data_is_data(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text) is not None, block
        if block.language == "toml":
            assert tomllib.loads(block.text), block


def test_what_is_too_long_is_tested_elsewhere() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    for text, file in LONG.items():
        assert (root / file).is_file() and any(text in block.text for rows in PYTHON.values() for block in rows)
