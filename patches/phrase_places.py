"""Which tokens of a prompt are the words of a name: both as the pieces of a SentencePiece tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

_SPACE = "\u2581"  # what SentencePiece writes for a space


def text_of(pieces: Sequence[str]) -> str:
    """What pieces say together."""
    return "".join(pieces).replace(_SPACE, " ").strip()


def places(prompt: Sequence[str], names: Sequence[Sequence[str]]) -> list[list[int]]:
    """The tokens of each name in a prompt, wherever it stands as whole words; none where it does not.

    By letters, not by tokens: a word has others in quotes or behind a bracket. Case says nothing. A name inside a
    longer one of the others is not meant ("dog" in "hot dog"), if it stands elsewhere as well.
    """
    parts = [piece.replace(_SPACE, " ").lower() for piece in prompt]
    letters, owners = "".join(parts), [index for index, part in enumerate(parts) for _ in part]
    wanted = [text_of(pieces).lower() for pieces in names]
    spans = {name: _spans(letters, name) for name in wanted}
    found = []
    for name in wanted:
        wider = [span for other, rows in spans.items() if name in other and name != other for span in rows]
        own = [(a, b) for a, b in spans[name] if not any(first <= a and b <= last for first, last in wider)]
        letters_of = {at for first, last in own or spans[name] for at in range(first, last) if letters[at] != " "}
        found.append(sorted({owners[at] for at in letters_of}))
    return found


def _spans(letters: str, name: str) -> list[tuple[int, int]]:
    """Where a name stands, and no word goes on before or behind it."""
    found: list[tuple[int, int]] = []
    start = letters.find(name)
    while name and start >= 0:
        end = start + len(name)
        before, behind = letters[:start][-1:], letters[end : end + 1]
        if not (before.isalnum() and name[0].isalnum()) and not (behind.isalnum() and name[-1].isalnum()):
            found.append((start, end))
        start = letters.find(name, start + 1)
    return found
