"""Whether experts read their inputs alike: files of tokenizers and image processors, compared by what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "preprocessor_config.json")
_PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def same_input(base: Path, other: Path) -> None:
    """Compare the files that both folders have.

    Raises:
        ValueError: one that means something else, or that cannot be read.
    """
    for file in _FILES:
        if (base / file).is_file() and (other / file).is_file() and _meaning(base / file) != _meaning(other / file):
            what = "pixel" if file == "preprocessor_config.json" else "token"
            raise ValueError(
                f"{other / file} differs from {base / file}: a {what} means the same to every expert, or they cannot "
                "be mixed"
            )


def _meaning(path: Path) -> Any:
    """What a file says, whatever its layout, order of keys and version, without what a user of it sets."""
    if path.suffix == ".model":
        return path.read_bytes()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            lines = (line.strip() for line in text.splitlines())
            return [line for line in lines if line and not line.startswith("#version")]
        told = json.loads(text)
        if path.name == "tokenizer.json":
            return _of_tokenizer(told)
        return {key: told.get(key) for key in _PIXELS} if path.name == "preprocessor_config.json" else told
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _of_tokenizer(told: dict[str, Any]) -> dict[str, Any]:
    model = told.get("model") or {}
    if "merges" in model:  # pairs, which older versions of tokenizers wrote as one text
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model = {**model, "merges": merges}
    added = sorted(told.get("added_tokens") or (), key=lambda token: token.get("id", 0))
    rest = {key: value for key, value in told.items() if key not in ("truncation", "padding", "version")}
    return {**rest, "model": model, "added_tokens": added}
