"""Python's own texts in two domains: what is code, what is prose, and that nothing is held out and trained on."""

from __future__ import annotations

import ast

import pytest

from attn_plugins.training.small_llama import corpus
from attn_plugins.training.small_llama.domains import DOMAINS, domain_texts, parted

SOURCE = '''"""The module.

Its second paragraph."""
import os  # kept


class A:
    "A class."

    value = """no docstring"""

    async def f(self):
        """A method,
        of two lines."""
        return """nor this"""


def g():
    1
    """nor this one"""
'''


def test_docstrings_are_prose_and_all_else_is_code() -> None:
    code, prose = parted(SOURCE)
    assert code.splitlines() == [
        "import os  # kept", "class A:", '    value = """no docstring"""', "    async def f(self):",
        '        return """nor this"""', "def g():", "    1", '    """nor this one"""',
    ]  # fmt: skip
    assert sorted(prose.split("\n\n")) == [
        "A class.", "A method,\nof two lines.", "Its second paragraph.", "The module.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "code", "prose"),
    [
        ('def f(): "Doc."\nx = 1\n', "def f(): ...\nx = 1\n", "Doc."),
        ('def f(): "Doc."; go()  # kept\n', "def f(): go()  # kept\n", "Doc."),
        ('class Ä(Error): """Ü\n    doc."""  # kept\n', "class Ä(Error): ...  # kept\n", "Ü\ndoc."),
        ('def f():\n    """Doc."""; go()\n    stay()\n', "def f():\n    go()\n    stay()\n", "Doc."),
        ('class A:\n    "Doc."\n\nx = 1\n', "class A:\n    ...\nx = 1\n", "Doc."),
        ('"""Doc."""; import os\n', "import os\n", "Doc."),
        ('"""Doc."""\n', "\n", "Doc."),
    ],
)
def test_what_stands_beside_a_docstring_stays_code(source: str, code: str, prose: str) -> None:
    assert parted(source) == (code, prose)
    ast.parse(code)


@pytest.mark.parametrize("odd", ["\f", "\v", "\x1c", "\x85", "\u2028"])
def test_lines_are_counted_as_python_counts_them(odd: str) -> None:
    """str.splitlines ends lines at form feeds and more, which Python's parser does not."""
    source = f'# one{odd}two\n{odd if odd in chr(12) else ""}\ndef f():\n    """Prose."""\n    return 1\n'
    code, prose = parted(source)
    assert prose == "Prose." and code.split("\n") == [f"# one{odd}two", "def f():", "    return 1", ""]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_any_ending_of_lines(ending: str) -> None:
    assert parted(ending.join(["def f():", '    "Prose."', "    return 1", ""])) == (
        "def f():\n    return 1\n",
        "Prose.",
    )


@pytest.mark.parametrize("source", ["print 'two'\n", "a = \x00\n"])
def test_what_this_python_cannot_parse_is_code(source: str) -> None:
    assert parted(source) == (source, "")


def test_domains_and_splits_share_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"module{number}" for number in range(60)] + ["pydoc_data.topics.lambda", "pydoc_data.topics.with"]
    texts = [(name, f'"""Prose of {name}."""\nuse("{name}")\n') for name in names[:60]]
    texts += [(name, f"Topic {name}.") for name in names[60:]] + [("nothing", " \n")]
    monkeypatch.setattr("attn_plugins.training.small_llama.domains.documents", lambda: iter(texts))
    found = {(domain, split): domain_texts(domain, split) for domain in DOMAINS for split in ("train", "held_out")}
    kept = [name for name in names if corpus.is_held_out(name)]
    assert kept and found["code", "held_out"] == [f'use("{name}")\n' for name in kept if name.startswith("module")]
    assert sum(map(len, found.values())) == 60 + 62  # code of modules, prose of all
    assert not any(
        "Prose" in text or "Topic" in text for split in ("train", "held_out") for text in found["code", split]
    )
    every = [text for texts in found.values() for text in texts]
    assert len(set(every)) == len(every)


def test_other_names_are_errors() -> None:
    for domain, split in (("law", "train"), ("code", "test")):
        with pytest.raises(ValueError, match="choose code or prose, and 'train' or 'held_out'"):
            domain_texts(domain, split)
