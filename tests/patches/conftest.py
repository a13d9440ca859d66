"""Each test of this folder notes which model classes it patched (tests/support/green.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from attn_plugins import registry
from attn_plugins.patches.family import Family, Site


@pytest.fixture(autouse=True)
def _note_patched_classes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    seen: set[str] = set()
    find_sites = Family.find_sites

    def noting(self: Family, root: Any) -> list[Site]:
        sites = find_sites(self, root)
        if sites and self in registry.families():  # not a family that a test makes up
            seen.add(f"{self.name}/{type(root).__name__}")
        return sites

    monkeypatch.setattr(Family, "find_sites", noting)
    yield
    request.node.user_properties += [("patched", key) for key in sorted(seen)]
