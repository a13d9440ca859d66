"""The search for a plan of spans: profile, choose under a budget, validate at a length that was not profiled.

MoA, arXiv 2406.14909, section 4, with an open solver, and one rule per KV head, so that the cache is as small as the
plan says. `search` does it all; what it writes is listed at `SearchResult.save`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_plugins.methods.moa import SpanPlan
from attn_plugins.methods.moa.plan import shape_of
from attn_plugins.pipelines.moa.calibration import Texts, retrieval_row, tasks_for
from attn_plugins.pipelines.moa.options import Options, SearchSettings
from attn_plugins.pipelines.moa.profile import Profile, Tick, profile, silent
from attn_plugins.pipelines.moa.running import spans_in_place
from attn_plugins.search import Choice, pareto_set
from attn_plugins.training.small_llama.retrieval import Retrieval

PROFILE, PLAN, FOUND, TABLE = "profile.pt", "plan.json", "search.json", "pareto.csv"


@dataclass(frozen=True)
class Validated:
    """Nats a token at the unseen length: of running text, and of the answers that the dense model gives."""

    text: float
    answers: float

    @property
    def mean(self) -> float:
        """What plans are ranked by: text and answers count alike."""
        return (self.text + self.answers) / 2


@dataclass(frozen=True)
class SearchResult:
    """`plan`: the best of `plans`, one for each choice of the Pareto set, by its validation."""

    settings: SearchSettings
    model: str
    profile: Profile
    options: Options
    choices: list[Choice]
    plans: list[SpanPlan]
    validated: list[Validated]
    dense: Validated

    @property
    def best(self) -> int:
        return min(range(len(self.plans)), key=lambda number: self.validated[number].mean)

    @property
    def plan(self) -> SpanPlan:
        return self.plans[self.best]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per plan of the Pareto set: predicted losses, densities, validation, and whether it was chosen."""
        settings, found = self.settings, []
        for number, (choice, plan, one) in enumerate(zip(self.choices, self.plans, self.validated, strict=True)):
            row: dict[str, Any] = {"plan": number, "chosen": int(number == self.best)}
            row |= {f"loss_{n}": loss for n, loss in zip(settings.lengths, choice.losses, strict=True)}
            row |= {f"density_{n}": plan.density(n) for n in settings.bounded}
            row |= {f"pairs_{n}": plan.pair_fraction(n) for n in settings.bounded}
            row |= {"text_nats": one.text, "answer_nats": one.answers}
            row |= {"dense_text_nats": self.dense.text, "dense_answer_nats": self.dense.answers}
            found.append(row)
        return found

    def save(self, folder: Path) -> list[Path]:
        """Write plan.json, pareto.csv, search.json and, with matplotlib, pareto.png, spans.png, influence.png."""
        from attn_plugins.pipelines.moa import plots

        folder.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        written = [self.plan.save(folder / PLAN), folder / TABLE, folder / FOUND]
        with written[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: f"{cell:.6g}" for key, cell in row.items()} for row in rows)
        settings = dataclasses.asdict(self.settings)
        counts = {str(n): self.profile.counts[n] for n in self.profile.lengths}
        text = {"model": self.model, "origin": self.profile.origin, "settings": settings, "rows_profiled": counts}
        written[2].write_text(json.dumps({**text, "plans": rows}, indent=1) + "\n", encoding="utf-8")
        return written + plots.write(self, folder)


def search(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    folder: Path,
    settings: SearchSettings | None = None,
    *,
    name: str = "",
    tick: Tick = silent,
) -> SearchResult:
    """Find a plan for `model`; the model is left as it was. Nothing is drawn from `texts.test`.

    Args:
        model: a causal language model of transformers, in evaluation mode, on any device.
        folder: where the profile lies or will lie: a search that was interrupted goes on from it.
        name: of the model, for the plan's file.
        tick: called with what was done and its tokens of work, `work` in all.

    Raises:
        ValueError, TypeError: a model that cannot be probed, a profile of another model in the folder, texts that are
            shorter than the longest length, or a budget that no plan meets.
    """
    settings = settings or SearchSettings()
    longest = max(*settings.lengths, settings.unseen)
    for which in ("calibration", "validation"):
        if len(getattr(texts, which)) <= longest:
            raise ValueError(f"{which} text of {len(getattr(texts, which)):,} tokens: rows have {longest:,}")
    tasks = tasks_for(tokenizer, texts.calibration)
    measured = profile(
        model, tasks, settings.lengths, settings.rows, folder / PROFILE,
        seed=settings.seed, influence=settings.influence, sink=settings.sink, block=settings.block, tick=tick,
    )  # fmt: skip
    options = Options.of(measured, settings, shape_of(model.config))
    choices = pareto_set(options.problem, points=settings.points, solver=settings.solver)
    origin = {"search": "attn_plugins moa-search", "density": settings.density, "lengths": list(settings.lengths)}
    origin |= {"seed": settings.seed, "rows": settings.rows}
    plans = [options.plan(choice, name or measured.origin, **origin) for choice in choices]
    held_out = tasks_for(tokenizer, texts.validation)
    results = [validate(model, held_out, plan, settings, tick) for plan in (None, *plans)]
    return SearchResult(settings, name, measured, options, choices, plans, results[1:], results[0])


def work(settings: SearchSettings, plans: int = 10) -> int:
    """Tokens of work of a search whose Pareto set has `plans` plans; a profiled token counts as three validated."""
    return settings.rows * sum(settings.lengths) + (plans + 1) * _validation_work(settings)


def _validation_work(settings: SearchSettings) -> int:
    return 2 * settings.validation_rows * settings.unseen // 3


@torch.inference_mode()
def validate(
    model: Any, tasks: Retrieval, plan: SpanPlan | None, settings: SearchSettings, tick: Tick = silent
) -> Validated:
    """Losses under a plan (None: dense) at the unseen length, on rows that depend on the seed alone."""
    length, text, answers = settings.unseen, 0.0, 0.0
    for number in range(settings.validation_rows):
        row = retrieval_row(tasks, length, f"validation {settings.seed} {length} {number}")
        ids = row.ids.to(model.device)
        logits = model(ids, use_cache=False).logits
        at = row.answers[1:].to(ids.device)
        own = logits[0, :-1][at].argmax(-1)
        start = number * (len(tasks.text) - length + 1) // settings.validation_rows
        running = torch.tensor([[tasks.start, *tasks.text[start : start + length - 1]]], device=ids.device)
        with spans_in_place(model, plan):
            predicted = model(ids, use_cache=False).logits if plan is not None else logits
            answers += float(torch.nn.functional.cross_entropy(predicted[0, :-1][at].float(), own))
            predicted = model(running, use_cache=False).logits[0, :-1].float()
        text += float(torch.nn.functional.cross_entropy(predicted, running[0, 1:]))
    tick("dense" if plan is None else "validating a plan", _validation_work(settings))
    return Validated(text / settings.validation_rows, answers / settings.validation_rows)
