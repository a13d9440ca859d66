"""The blocks of code in the documentation, and what stands in for a reader's own models when they run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """`line`: of the page, from 1."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block: continued lines joined, comments and prompts left out."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = [re.sub(r"\s+#.*$", "", line).strip().removeprefix("$ ") for line in joined.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Those of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text[: found.start()].count("\n") + 1, found[1], found[2]) for found in FENCE.finditer(text)
    ]


def indented(page: Path) -> list[int]:
    """Lines where a block of code is indented and not fenced: nobody could say what language it is."""
    text = FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))
    lines = text.split("\n")
    in_list = False
    found = []
    for number, line in enumerate(lines):
        if re.match(r"\s*([-*]|\d+\.) ", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        begins = number == 0 or not lines[number - 1].strip() or lines[number - 1].startswith("#")
        if line.startswith("    ") and not in_list and begins:
            found.append(number + 1)
    return found


class Small:
    """A tiny pipeline in the place of a reader's own: calls are small whatever they ask for."""

    def __init__(self, pipe: Any, **always: Any) -> None:
        self.pipe, self.always = pipe, always

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def __call__(self, prompt: Any = "a cat", **kwargs: Any) -> Any:
        return self.__dict__["pipe"](prompt, **{**kwargs, **self.always})


def small_wan() -> Small:
    from tests.support import tiny_pipelines

    pipe = tiny_pipelines.build("wan")
    pipe.set_progress_bar_config(disable=True)
    return Small(pipe, **tiny_pipelines.PIPELINES["wan"].call, num_inference_steps=4)


def replacing(patch: Callable[..., Any], unpatch: Callable[[Any], Any]) -> Callable[..., Any]:
    """`patch` for pages that show one setting after another: what an earlier line left is taken out first."""

    def patched(obj: Any, *args: Any, **kwargs: Any) -> Any:
        import contextlib

        with contextlib.suppress(ValueError):
            unpatch(obj)
        return patch(obj, *args, **kwargs)

    return patched
