"""Measure the presets of the embedded video model, and write what was found into their files.

    python tools/measure_presets.py [--frames 4 16] [--seeds 3]

On an idle machine: each quality runs as `attn-plugins tune` validates plans, dense runs between them, on pairs of
digits and seeds that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attn_plugins import presets  # noqa: E402
from attn_plugins.pipelines.benching.machine import commit  # noqa: E402
from attn_plugins.pipelines.demo_model import load_pipeline, prompt  # noqa: E402
from attn_plugins.pipelines.tuner.candidates import Single  # noqa: E402
from attn_plugins.pipelines.tuner.diffusion import Call, DiffusionSubject  # noqa: E402
from attn_plugins.pipelines.tuner.files import machine  # noqa: E402
from attn_plugins.pipelines.tuner.outcomes import measure  # noqa: E402

METHOD, PRESET = "gna", "moving_digits"
FILE = ROOT / "configs" / METHOD / f"{PRESET}.yaml"


def rows(frames: int, seeds: int) -> dict[str, dict[str, Any]]:
    """{quality: a row of presets.MEASURED} at one length of video."""
    subject = DiffusionSubject(load_pipeline())
    cases = [Call(prompt(digits, frames), seed, digits) for digits in ("04", "69") for seed in range(200, 200 + seeds)]
    subject.run(cases[0])
    found, failed = measure(subject, [Single(METHOD, quality, PRESET) for quality in presets.QUALITIES], cases, print)
    assert not failed, failed
    about = {
        "machine": machine(subject), "torch": str(torch.__version__), "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    return {
        one.what.quality: {
            "tokens": frames * 256, "density": round(one.density, 3), "speedup": round(one.speedup, 2),
            "loss": round(one.loss, 3), **about,
        }
        for one in found
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16], help="lengths of the video")
    parser.add_argument("--seeds", type=int, default=3, help="of each pair of digits")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {quality: [] for quality in presets.QUALITIES}
    for frames in sorted(arguments.frames):
        for quality, row in rows(frames, arguments.seeds).items():
            found[quality].append(row)
    text = re.sub(r"^measured:.*\Z", "", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    told = yaml.safe_dump({"measured": found}, sort_keys=False, default_flow_style=None, width=160)
    FILE.write_text(text.rstrip() + "\n" + told, encoding="utf-8")
    presets.parse(FILE.read_text(encoding="utf-8"), METHOD, FILE.name)
    print(FILE)


if __name__ == "__main__":
    main()
