"""What a model is compared on: prompts, text, pictures; a person's own, or what comes with this package's needs."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attn_plugins.training.pictures import SUFFIXES

VALIDATED = 0.25  # share of the embedded corpus' held-out text by which plans were chosen: not judged on again
LIBRARY = (
    "text: the standard library's sources and help, which the model may have been trained on (--text for your own)"
)
HELD_OUT = "text: documents of the embedded corpus that the model was not trained on"
PHOTOS = "pictures: crops of scikit-learn's and scikit-image's sample photographs (--pictures for your own)"
NORMALISED = 0.5  # mean and deviation of a channel where a model says nothing


def prompts(given: Sequence[str], file: Path | None, default: str) -> list[str]:
    """Those given, and the lines of a file (empty ones, and those that begin with #, left out), each once, in order.

    Raises:
        FileNotFoundError: no such file. ValueError: a file without prompts.
    """
    found = list(given)
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"--prompts {file}: no such file; give one with a prompt a line")
        lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise ValueError(f"--prompts {file}: no prompts there; give one a line")
        found += lines
    return list(dict.fromkeys(found)) or [default]


def text(tokenizer: Any, files: Sequence[Path], embedded: bool) -> tuple[list[int], str]:
    """Ids of the text to read, and a note on where it is from. embedded: the model is the one of this package.

    Raises:
        FileNotFoundError: no such file. ValueError: nothing in them.
    """
    from attn_plugins.training.small_llama import corpus
    from attn_plugins.training.small_llama.tokenizer import tokenize

    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"--text {missing}: no such file")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files] or corpus.texts("held_out")
    if hasattr(tokenizer, "backend_tokenizer"):
        ids = tokenize(tokenizer, texts)
    else:
        ids = [token for one in texts for token in tokenizer(one)["input_ids"]]
    if not ids:
        raise ValueError(f"--text {', '.join(map(str, files))}: no text there")
    if files:
        return ids, f"text: {', '.join(path.name for path in files)}"
    return (ids[int(VALIDATED * len(ids)) :], HELD_OUT) if embedded else (ids, LIBRARY)


def start_token(tokenizer: Any) -> int:
    """What stands before each row: the token that begins texts, else the one that ends them."""
    known = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    return next((token for token in known if isinstance(token, int)), 0)


def pictures(
    settings: Mapping[str, Any], config: Any, folder: Path | None, count: int, batch: int
) -> tuple[list[torch.Tensor], str]:
    """Batches (B, 3, H, W) of at most `count` pictures, normalised as the model wants, and where they are from.

    Args:
        settings: of preprocessor_config.json, whose mean and deviation count. config: the model's, whose size counts.
        folder: pictures of your own, at any depth; None: crops of photographs that come with packages.

    Raises:
        ValueError: no pictures there. ImportError: no folder, and no package with photographs.
    """
    height, width = _size(settings, config)
    mean, deviation = (
        torch.tensor(settings.get(name) or [NORMALISED] * 3).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    found = [((pixels - mean) / deviation) for pixels in _pixels(folder, count, height, width)]
    return [torch.stack(found[at : at + batch]) for at in range(0, len(found), batch)], (
        f"pictures: {len(found)} of {folder.name}" if folder else PHOTOS
    )


def _size(settings: Mapping[str, Any], config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or settings.get("crop_size") or settings.get("size") or 224
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge", 224)
    return tuple(size) if isinstance(size, (list, tuple)) else (int(size), int(size))  # type: ignore[return-value]


def _pixels(folder: Path | None, count: int, height: int, width: int) -> Iterator[torch.Tensor]:
    """(3, height, width) each, in 0..1."""
    from PIL import Image, ImageOps

    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not files:
            raise ValueError(f"--pictures {folder}: no pictures there ({', '.join(SUFFIXES)})")
        for file in files[:: max(1, len(files) // count)][:count]:
            with Image.open(file) as picture:
                yield _tensor(ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
        return
    photos = [Image.open(path).convert("RGB") for path in sample_photos()]
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        side, left, top = torch.rand(3, generator=generator).tolist()
        edge = int(min(photo.size) * (0.5 + 0.5 * side))
        x, y = int(left * (photo.width - edge)), int(top * (photo.height - edge))
        yield _tensor(photo.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + edge, y + edge)))


def sample_photos() -> list[Path]:
    """The photographs that come with scikit-learn and scikit-image, as far as they are installed.

    Raises:
        ImportError: neither.
    """
    found = []
    for package, names in (
        ("sklearn.datasets.images", ("china.jpg", "flower.jpg")),
        ("skimage.data", ("astronaut.png", "chelsea.png", "coffee.png")),
    ):
        try:
            folder = importlib.resources.files(package)
        except ModuleNotFoundError:
            continue
        found += [path for name in names if (path := Path(str(folder / name))).is_file()]
    if not found:
        raise ImportError("no pictures at hand: give --pictures FOLDER, or install scikit-learn or scikit-image")
    return found


def _tensor(picture: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
