"""Lengths of documents as they are: histograms of real texts, and sequences packed from them, always the same."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterable, Iterator

# Documents with at least so many tokens, and fewer than twice as many, in Python 3.11's standard library and help
# topics by the embedded model's tokenizer, begin and end of text not counted: first its modules, then their functions
# and classes one by one, each with the topics. `count_lengths` makes them anew of `documents()` and `pieces()`.
MODULES = {
    8: 3, 16: 3, 32: 13, 64: 20, 128: 43, 256: 59, 512: 88, 1024: 110, 2048: 136, 4096: 99, 8192: 63, 16384: 41,
    32768: 8, 65536: 1,
}  # fmt: skip
PIECES = {
    4: 4, 8: 61, 16: 355, 32: 700, 64: 998, 128: 1088, 256: 876, 512: 564, 1024: 275, 2048: 176, 4096: 73, 8192: 22,
    16384: 6, 32768: 1,
}  # fmt: skip
LONG = 32768  # tokens from which on sequences are packed of modules, else of pieces
SHARE = 4  # no document is longer than a fourth of the sequence: what is longer goes on in pieces, as packers cut it


def pieces(documents: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The functions and classes at the top of modules, with their decorators; other documents whole."""
    for name, text in documents:
        if name.startswith("pydoc_data."):
            yield text
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                yield "".join(lines[first - 1 : node.end_lineno])


def count_lengths(texts: Iterable[str], count_tokens: Callable[[str], int]) -> dict[int, int]:
    """A histogram of texts, empty ones left out: by powers of two, the number of texts with so many tokens and more."""
    found: dict[int, int] = {}
    for text in texts:
        tokens = count_tokens(text)
        if tokens:
            least = 1 << (tokens.bit_length() - 1)
            found[least] = found.get(least, 0) + 1
    return dict(sorted(found.items()))


def packed_lengths(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Documents side by side that fill `tokens`: a bin by its count, a length in it, the last one cut.

    Raises:
        ValueError: fewer tokens than one.
    """
    if tokens < 1:
        raise ValueError(f"{tokens} tokens hold no document")
    histogram, dice = MODULES if tokens >= LONG else PIECES, random.Random(seed)
    longest = max(tokens // SHARE, 1)
    lengths: list[int] = []
    left = tokens
    while left:
        least = dice.choices(list(histogram), list(histogram.values()))[0]
        document = min(least + int(dice.random() * least), left)
        left -= document
        lengths += [longest] * (document // longest) + [document % longest] * (document % longest > 0)
    return tuple(lengths)
