"""One warning outside the tested versions, none inside."""

from __future__ import annotations

import warnings

import pytest

from attn_plugins.patches import versions
from attn_plugins.patches.versions import TESTED, warn_if_untested


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    warn_if_untested.cache_clear()
    yield
    monkeypatch.undo()
    warn_if_untested.cache_clear()


@pytest.mark.parametrize("installed", ["0.37.1", "0.43.0.dev0", "1.0"])
def test_outside_it_warns_once(monkeypatch, installed):
    monkeypatch.setattr(versions, "version", lambda name: installed)
    with pytest.warns(UserWarning, match=f"diffusers {installed} .* 0.38 to 0.42"):
        warn_if_untested("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested("diffusers")


def test_one_tested_version_is_named_once(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "4.57.1")
    with pytest.warns(UserWarning, match=r"tested with 5.23\. "):
        warn_if_untested("transformers")


@pytest.mark.parametrize("installed", ["0.38.0", "0.42.1", "unknown"])
def test_inside_and_unreadable_versions_are_silent(monkeypatch, installed):
    monkeypatch.setattr(versions, "version", lambda name: installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested("diffusers")
        warn_if_untested("a library of a third party")


@pytest.mark.parametrize("library", TESTED)
def test_what_is_installed_here_is_tested(library):
    pytest.importorskip(library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(library)
