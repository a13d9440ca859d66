"""A report as one HTML file that needs no network: text, tables, and pictures as data URIs. Everything is escaped."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass

TEMPLATE = "page.html.jinja"
KINDS = {b"\x89PNG": "image/png", b"GIF8": "image/gif", b"\xff\xd8\xff": "image/jpeg"}
Cells = Sequence[str]


@dataclass(frozen=True)
class Picture:
    """`data`: the bytes of a PNG, GIF or JPEG. `alt`: what it shows, for those who cannot see it."""

    data: bytes
    alt: str
    caption: str = ""
    small: bool = False  # one of several in a row

    @property
    def uri(self) -> str:
        """Raises ValueError for bytes of another kind."""
        for start, kind in KINDS.items():
            if self.data.startswith(start):
                return f"data:{kind};base64,{base64.b64encode(self.data).decode('ascii')}"
        raise ValueError(f"a picture that begins with {self.data[:4]!r}: give PNG, GIF or JPEG")


@dataclass(frozen=True)
class Table:
    """Header first; the first column names the rows. prose: the last one is text."""

    rows: Sequence[Cells]
    caption: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Section:
    """`text`: paragraphs. `code`: printed as it stands."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    code: str = ""


@dataclass(frozen=True)
class Verdict:
    """One method in three sentences."""

    method: str
    speed: str
    cost: str
    bound: str


@dataclass(frozen=True)
class Page:
    """`about`: what was run, on what. `notes`: what is missing, and why."""

    title: str
    about: Sequence[str]
    verdicts: Sequence[Verdict]
    overview: Table
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()


def render(page: Page) -> str:
    """The HTML.

    Raises:
        ImportError: no Jinja2.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("the HTML report needs Jinja2 (pip install jinja2)") from error
    source = importlib.resources.files("attn_plugins") / "assets" / "report" / TEMPLATE
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source.read_text(encoding="utf-8")).render(page=page)
