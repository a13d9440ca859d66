"""From what a person asks to comparisons: which inputs a model of its kind takes, and what it does not."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.comparing import inputs
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.language import Reading
from attn_plugins.pipelines.comparing.loading import TITLES, Kind, Loaded
from attn_plugins.pipelines.comparing.pages import AnyComparison

PROMPT, DIGITS = "a cat walking on a beach at sunset", "37"
OF = {
    "pipeline": (
        "prompts", "prompt_file", "seeds", "steps", "height", "width", "frames", "arguments", "measures", "shown",
    ),
    "language": ("text", "window", "rows", "prompt_tokens", "tokens"),
    "classifier": ("pictures", "count", "batch"),
}  # fmt: skip
OPTION = {"prompts": "prompt", "prompt_file": "prompts", "seeds": "seed", "arguments": "argument"}


@dataclass(frozen=True)
class Request:
    """The options of `attn-plugins compare` that only one kind of model takes; what is not given is None or empty."""

    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    measures: int | None = None
    shown: int | None = None
    text: tuple[Path, ...] = ()
    window: int | None = None
    rows: int | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    pictures: Path | None = None
    count: int | None = None
    batch: int | None = None

    def check(self, kind: Kind) -> None:
        """Raises ValueError for an option of another kind of model: nothing that was asked for is left out silently."""
        plain = Request()
        for other, names in OF.items():
            given = [name for name in names if getattr(self, name) != getattr(plain, name)]
            if other != kind and given:
                option = OPTION.get(given[0], given[0]).replace("_", "-")
                raise ValueError(f"--{option} is for a {TITLES[other]}, and this is a {TITLES[kind]}")


def run(
    loaded: Loaded, asked: Sequence[Asked], request: Request, *, progress: bool = False
) -> tuple[Sequence[AnyComparison], list[str]]:
    """The comparisons, one a method, and notes on what they were made on.

    Raises:
        ValueError, OSError: whatever the inputs, the methods or the model refuse.
    """
    request.check(loaded.place.kind)
    if loaded.place.kind == "pipeline":
        return _pipeline(loaded, asked, request, progress)
    from attn_plugins.pipelines import compare

    model = loaded.obj
    if loaded.place.kind == "language":
        reading = _reading(loaded, request)
        ids, note = inputs.text(loaded.reader, request.text, bool(loaded.place.embedded))
        return compare.compare_language(model, asked, ids, reading, progress=progress), [note]
    batches, note = inputs.pictures(
        loaded.reader, model.config, request.pictures, request.count or 64, request.batch or 8
    )
    return compare.compare_classifier(model, asked, batches, progress=progress), [note]


def _pipeline(
    loaded: Loaded, asked: Sequence[Asked], request: Request, progress: bool
) -> tuple[Sequence[AnyComparison], list[str]]:
    from attn_plugins.pipelines.compare import compare_pipeline

    pipe = loaded.obj
    embedded = loaded.place.embedded == "moving_digits"
    common, to_frames = dict(request.arguments), None
    names = inputs.prompts(request.prompts, request.prompt_file, DIGITS if embedded else PROMPT)
    if embedded:
        from attn_plugins.pipelines import demo_model

        if request.height or request.width:
            raise ValueError("moving_digits draws 32 x 32 pixels: leave --height and --width out")
        to_frames = demo_model.to_frames
        prompts = {
            name: {**demo_model.prompt(name, request.frames or 16, steps=request.steps or 20), **common}
            for name in names
        }
        common = {}
    else:
        sizes = {
            "num_inference_steps": request.steps, "height": request.height, "width": request.width,
            "num_frames": request.frames,
        }  # fmt: skip
        common = {**{name: value for name, value in sizes.items() if value is not None}, **common}
        takes = "prompt" in inspect.signature(type(pipe).__call__).parameters and "prompt" not in common
        if not takes and (request.prompts or request.prompt_file):
            raise ValueError(f"{type(pipe).__name__} takes no prompt, or --argument gives it: leave --prompt out")
        prompts = {name: {"prompt": name} for name in names} if takes else {"": {}}
    found = compare_pipeline(
        pipe, asked, call_kwargs=common, prompts=prompts, seeds=request.seeds or (0,), to_frames=to_frames,
        measure_rows=64 if request.measures is None else request.measures,
        keep=4 if request.shown is None else request.shown, progress=progress,
    )  # fmt: skip
    return found, [] if len(prompts) > 1 else [f"prompt: {names[0]}"] if "" not in prompts else []


def _reading(loaded: Loaded, request: Request) -> Reading:
    """What was asked for, or the usual, as far as the model's positions go."""
    given = {
        "window": request.window, "rows": request.rows, "prompt": request.prompt_tokens, "tokens": request.tokens,
        "start": inputs.start_token(loaded.reader),
    }  # fmt: skip
    reading = Reading(**{name: value for name, value in given.items() if value is not None})
    most = getattr(loaded.obj.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and request.window is None:
        reading = dataclasses.replace(reading, window=min(reading.window, most))
    if most is not None and request.prompt_tokens is None:
        reading = dataclasses.replace(reading, prompt=max(min(reading.window, most - reading.tokens), 2))
    return reading
