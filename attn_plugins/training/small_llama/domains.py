"""Python's own texts in two domains: code without its docstrings, and the prose of docstrings and help topics."""

from __future__ import annotations

import ast
import io

from attn_plugins.training.small_llama.corpus import documents, is_held_out

DOMAINS = ("code", "prose")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def domain_texts(domain: str, split: str) -> list[str]:
    """The documents of one of `DOMAINS`, of the split "train" or "held_out": the same documents as of `corpus.texts`.

    Raises:
        ValueError: another domain or split.
    """
    if domain not in DOMAINS or split not in ("train", "held_out"):
        raise ValueError(
            f"domain={domain!r}, split={split!r}: choose {' or '.join(DOMAINS)}, and 'train' or 'held_out'"
        )
    found = []
    for name, text in documents():
        if is_held_out(name) == (split == "held_out"):
            code, prose = ("", text) if name.startswith("pydoc_data.topics.") else parted(text)
            found.append(code if domain == "code" else prose)
    return [text for text in found if text.strip()]


def parted(source: str) -> tuple[str, str]:
    """(code without docstrings, the docstrings) of a module; of one that this Python cannot parse, all is code."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source, ""
    lines = io.StringIO(source, newline=None).read().split("\n")  # not at form feeds, which ast does not count
    prose = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text:
            prose.append(text)
            _cut(lines, node.body, isinstance(node, ast.Module))  # type: ignore[attr-defined]
    return "\n".join(line for line in lines if line.strip()) + "\n", "\n\n".join(prose)


def _cut(lines: list[str], body: list[ast.stmt], whole: bool) -> None:
    """Take a docstring, the first of a body, out of the lines. What stands beside it (`def f(): "doc"; go()`) stays,
    and a body of nothing else becomes `...`, unless it is the `whole` module's: what is left is code.
    """
    node = body[0]
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    # Columns are of UTF-8 bytes.
    before = lines[first].encode()[: node.col_offset].decode()
    rest = lines[last].encode()[node.end_col_offset :].decode().strip().removeprefix(";").strip()
    for line in range(first, last + 1):
        lines[line] = ""
    alone = len(body) == 1 and not whole
    if rest or alone:
        lines[first] = before + "  ".join(part for part in ("..." if alone else "", rest) if part)
