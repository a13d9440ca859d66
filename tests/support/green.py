"""Which model classes passed: noted by the tests that patch them, written down or compared at the end of a run.

    pytest tests/patches --models=docs/models.json [--write-models]

A class is green if tests of tests/patches patched it and all that did passed. `tools/matrix.py` makes the matrix of
supported models of it, so a row stands there because its tests passed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

LIBRARIES = ("diffusers", "transformers")


class Green:
    """A pytest plugin: collects ("patched", "family/class") properties of tests, and their outcomes."""

    def __init__(self, path: Path, write: bool) -> None:
        self.path, self.write = path, write
        self.failed: set[str] = set()
        self.patched: dict[str, set[str]] = defaultdict(set)  # "family/class" -> tests

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        for name, value in report.user_properties:
            if name == "patched":
                self.patched[str(value)].add(report.nodeid)

    def classes(self) -> dict[str, list[str]]:
        """family -> its green classes."""
        found: dict[str, list[str]] = defaultdict(list)
        for key, tests in sorted(self.patched.items()):
            if not tests & self.failed:
                family, name = key.split("/")
                found[family].append(name)
        return dict(found)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # a worker of xdist sees only its own part
        now = {"versions": {name: version(name) for name in LIBRARIES}, "classes": self.classes()}
        if self.write:
            self.path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            return
        said = json.loads(self.path.read_text(encoding="utf-8"))
        different = sorted(_flat(said["classes"]) ^ _flat(now["classes"]))
        if said["versions"] == now["versions"] and different:
            print(f"\n{self.path.name} is not what these tests found: run `make matrix`. Different: {different}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _flat(classes: dict[str, list[str]]) -> set[str]:
    return {f"{family}/{name}" for family, names in classes.items() for name in names}
