"""The README's code runs as it stands, its tables are the registry's, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def matrix():
    """tools/matrix.py as a module."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_block_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    pytest.importorskip("diffusers")
    # elsewhere than in the checkout, as a user would; the path stands in for an installation
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; torch.set_num_threads(1)\n{blocks[0]}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "gna" in result.stdout and (tmp_path / "37.gif").read_bytes()[:3] == b"GIF"
    assert "dense attention used" not in result.stderr


def test_tables_are_the_registrys(capsys):
    assert matrix().main(["--check"]) == 0, capsys.readouterr().err


def test_check_sees_a_stale_table(tmp_path, monkeypatch):
    module = matrix()
    stale = tmp_path / "README.md"
    stale.write_text(README.replace("](docs/gna.md) |", "](docs/gna.md) | an old cell |", 1), encoding="utf-8")
    monkeypatch.setattr(module, "README", stale)
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0 and stale.read_text(encoding="utf-8") == README


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in targets if link and not (page.parent / link).exists()]
