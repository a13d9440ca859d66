"""The page of each kind of comparison: what of it goes into the report, in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attn_plugins.pipelines.comparing import plots
from attn_plugins.pipelines.comparing.classification import ClassifierComparison
from attn_plugins.pipelines.comparing.comparison import LAYERS_TITLE, STEPS_TITLE, Comparison
from attn_plugins.pipelines.comparing.language_comparison import LanguageComparison
from attn_plugins.pipelines.comparing.likeness import Likeness, decibels
from attn_plugins.pipelines.comparing.measure_files import can_plot, figure
from attn_plugins.pipelines.comparing.overview import Figures, overview
from attn_plugins.pipelines.comparing.page import Page, Picture, Section, Table, Verdict
from attn_plugins.pipelines.comparing.strips import strips

AnyComparison = Comparison | LanguageComparison | ClassifierComparison
DENSE = "dense"
FLOOR = (
    "The column of dense attention has its own times, and as quality the noise floor: dense run again, against itself. "
    "No method can be judged beyond it."
)


def rows_of(comparisons: Sequence[AnyComparison]) -> dict[str, Figures]:
    """{name: figures}, dense first."""
    found = {DENSE: comparisons[0].floor()}
    for one in comparisons:
        found[one.method if one.method not in found else f"{one.method} ({len(found)})"] = one.figures()
    return found


def page(name: str, comparisons: Sequence[AnyComparison], notes: Sequence[str] = ()) -> Page:
    """The report on a model by that name; all comparisons are of one kind, and against the same dense runs."""
    first = comparisons[0]
    if isinstance(first, Comparison):
        about, sections = _pipeline([one for one in comparisons if isinstance(one, Comparison)])
    elif isinstance(first, LanguageComparison):
        about, sections = _language([one for one in comparisons if isinstance(one, LanguageComparison)])
    else:
        about, sections = f"{len(first.kl)} pictures, {first.batch} a batch", []
    if not can_plot() and not isinstance(first, ClassifierComparison):
        notes = [*notes, plots.NO_PLOTS]
    rows = rows_of(comparisons)
    return Page(
        f"{', '.join(one.method for one in comparisons)} against dense attention on {name}",
        [f"{first.model}: {about}. {first.machine}.", *notes],
        [Verdict(one.method, *one.sentences()) for one in comparisons],
        Table(overview(rows, meanings=True), prose=True),
        [*sections, *(_patch(one) for one in comparisons)],
        [FLOOR, *first.notes, *_intervals(rows)],
    )


def _intervals(rows: Mapping[str, Figures]) -> list[str]:
    known = any(key.endswith("_low") for figures in rows.values() for key in figures)
    return ["In brackets: the 95 % interval, from the spread between prompts, rows or pictures."] if known else []


def _patch(one: AnyComparison) -> Section:
    return Section(f"What {one.method} patched", code=one.summary)


def _pipeline(comparisons: Sequence[Comparison]) -> tuple[str, list[Section]]:
    first = comparisons[0]
    sections = [
        Section(f"Pictures: {first.cases[number]}", pictures=strips(comparisons, number))
        for number in range(len(first.frames))
    ]
    drawn = can_plot()
    if drawn and len(comparisons) > 1:
        sections.append(Section("Latents, step by step", pictures=[plots.latents(comparisons)]))
    if len(first.cases) > 1:
        sections.append(Section("Case by case", tables=[_cases(comparisons)]))
    for one in comparisons:
        tables = [Table(one.per_step(), STEPS_TITLE)]
        if one.measures is not None and one.measures.layer_steps:
            tables.append(Table(one.measures.per_layer(), LAYERS_TITLE))
        shown = [Picture(plots.png(figure(one)), f"{one.method} by layer and step")] if drawn else []
        sections.append(Section(f"{one.method}, by step and layer", pictures=shown, tables=tables))
    prompts = f"{len(first.prompts)} prompts" if len(first.prompts) > 1 else "one prompt"
    return f"{first.steps} steps, {prompts}, seeds {', '.join(map(str, first.seeds))}", sections


def _cases(comparisons: Sequence[Comparison]) -> Table:
    """Drift and PSNR of each prompt and seed, by method."""
    first = comparisons[0]
    likenesses: list[tuple[str, Likeness]] = [
        ("dense again", first.noise),
        *((c.method, c.likeness) for c in comparisons),
    ]
    head = ["case", *(f"{what}, {name}" for name, _ in likenesses for what in ("drift", "PSNR"))]
    rows = [head]
    for number, case in enumerate(first.cases):
        scores = [likeness.cases[number] for _, likeness in likenesses]
        cells = [
            text for one in scores for text in (f"{one.drift:.1e}", "-" if one.psnr is None else decibels(one.psnr))
        ]
        rows.append([case, *cells])
    return Table(rows)


def _language(comparisons: Sequence[LanguageComparison]) -> tuple[str, list[Section]]:
    first = comparisons[0]
    shown = [plots.positions(comparisons)] if can_plot() else []
    tables = [Table(one.by_position(), one.method) for one in comparisons]
    text = ["How far back a token can look grows with its place in the text, and with it what a method leaves out."]
    speed = f"; speed behind a prompt of {first.prompt:,} tokens, {first.tokens} generated" if first.speed else ""
    return f"{first.rows} rows of {first.window:,} tokens{speed}", [Section("By position", text, tables, shown)]
