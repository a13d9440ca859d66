"""Every test in this folder runs interpreted, with bfloat16 repaired, under the memory sanitizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.sanitize import sanitize


@pytest.fixture(autouse=True)
def _sanitized(interpreted: None) -> Iterator[None]:
    with sanitize():
        yield
