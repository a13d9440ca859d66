"""A tiny pipeline as what is tuned, and two settings to try on it."""

from __future__ import annotations

from attn_plugins.pipelines.tuner.candidates import Candidate
from attn_plugins.pipelines.tuner.diffusion import Call, DiffusionSubject
from tests.support import tiny_pipelines

WINDOWS = (
    Candidate("gna", "narrow", {"window": (1, 2, 2), "stride": 1}),
    Candidate("gna", "wide", {"window": (1, 2, 4), "stride": 1}),
)


def tiny_subject() -> DiffusionSubject:
    return DiffusionSubject(tiny_pipelines.build("wan"))


def call(prompt: str = "a cat", seed: int = 0, number: int = 4) -> Call:
    known = tiny_pipelines.PIPELINES["wan"].call
    return Call({**known, "prompt": prompt, "num_inference_steps": number}, seed, prompt)
