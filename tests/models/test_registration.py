"""The import hook does no harm: whatever is wrong with our types, transformers is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attn_plugins.models import registration


def test_registering_that_fails_is_a_warning(monkeypatch):
    def fail() -> None:
        raise KeyError("no such architecture")

    monkeypatch.setattr(registration, "register", fail)
    with pytest.warns(UserWarning, match="BAM are not registered: 'no such architecture'"):
        registration.when_transformers_comes()


def test_registering_twice_is_registering_once():
    from transformers import AutoConfig

    before = type(AutoConfig.for_model("attn_plugins_bam_llama"))
    registration.register()
    registration.when_transformers_comes()
    assert type(AutoConfig.for_model("attn_plugins_bam_llama")) is before
    assert not [finder for finder in sys.meta_path if "attn_plugins" in type(finder).__module__]


def test_old_configs_are_refused_with_what_to_do(monkeypatch):
    from attn_plugins.models.bam import config
    from attn_plugins.models.bam.architectures import Architecture

    class Old:
        pass

    monkeypatch.setattr(Architecture, "dense_class", lambda self, part: Old)
    with pytest.raises(ImportError, match="need transformers 5.12 or newer"):
        config.config_class(Architecture("older", "Older"))


def test_the_file_of_a_config_may_be_what_is_imported_first():
    """It imports the Auto classes in its midst, before it has a class of which ours could be made."""
    code = "import attn_plugins; from transformers import LlamaConfig, AutoConfig; " + "; ".join(
        f"AutoConfig.for_model('attn_plugins_bam_{name}')" for name in ("llama", "phi")
    )
    subprocess.run([sys.executable, "-W", "error:attn_plugins::", "-c", code], check=True)
