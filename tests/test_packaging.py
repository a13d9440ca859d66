"""What is installed is what is here: every folder of code, every config, the assets, one copy of each module."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]  # package -> folder
DATA = (".yaml", ".typed")
TEXT = (".py", ".toml", ".txt", ".md", ".yaml", ".cfg", "")
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def code_folders() -> dict[str, Path]:
    """Package name -> folder, for every folder that holds a Python file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            found[".".join((package, *path.parent.relative_to(ROOT / folder).parts))] = path.parent
    return found


def expected_files() -> set[str]:
    """What the wheel must hold, by its path in site-packages."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            wanted = path.suffix in (".py", *DATA) or inside.parts[0] == "assets"
            if path.is_file() and wanted and "__pycache__" not in inside.parts:
                found.add("/".join((*package.split("."), *inside.parts)))
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy of what it is made of (a build leaves its own folders behind)."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(place), str(source)], check=True, timeout=300)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place / "site")
    return place / "site"


def test_package_list_is_whole():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(code_folders())


def test_every_package_has_an_init():
    assert not [name for name, folder in code_folders().items() if not (folder / "__init__.py").is_file()]


def test_wheel_holds_every_module_config_and_asset(installed):
    held = {str(path.relative_to(installed).as_posix()) for path in installed.rglob("*") if path.is_file()}
    assert {name for name in held if ".dist-info/" not in name} == expected_files()
    assert [name for name in held if name.endswith("licenses/LICENSE")]


def test_installed_package_works_away_from_the_checkout(installed, tmp_path):
    code = """
import importlib.resources, sys, attn_plugins, attn_plugins.registry
import attn_plugins.patches.family, attn_plugins.pipelines.cli
assert attn_plugins.__file__.startswith(sys.argv[1]), attn_plugins.__file__
configs = importlib.resources.files("attn_plugins.configs")
found = [path.name for folder in configs.iterdir() if folder.is_dir() for path in folder.iterdir()]
assert any(name.endswith(".yaml") for name in found), found
assert importlib.resources.files("attn_plugins").joinpath("assets", "moving_digits", "model_index.json").is_file()
assert "gna" in attn_plugins.registry.method_names() and len(attn_plugins.registry.families()) > 5
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]){code}", str(installed)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)


def test_no_module_is_imported_twice():
    """Under two names a module registers everything twice; this is how it is imported in a checkout."""
    code = """
import sys, attn_plugins, attn_plugins.registry, attn_plugins.pipelines.cli
attn_plugins.registry.families()
print([name for name in sys.modules if name.split(".")[0] in ("patches", "pipelines", "configs")])
assert "attn_plugins.patches.families" in sys.modules
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"


def imported_tops(path: Path) -> set[str]:
    """First parts of the names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def our_files() -> list[Path]:
    """Every text file of the repository that is not generated."""
    hidden = ("out", "build")
    rows = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        generated = parts[0] in hidden or any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if path.is_file() and path.suffix in TEXT and not generated and not parts[0].endswith(".egg-info"):
            rows.append(path)
    return rows


def test_nothing_imports_the_folders_by_their_bare_names():
    bare = {"patches", "pipelines", "configs"}
    files = [path for path in our_files() if path.suffix == ".py"]
    assert len(files) > 30
    assert not [str(path) for path in files if imported_tops(path) & bare]


def test_no_registry_host_and_no_path_of_a_machine():
    # put together here, so that this file does not find itself
    places = ["index" + "-url", "find" + "-links", "/work" + "/(main|shared|venv)", "/tmp" + "/[a-z]", "/home" + "/"]
    pattern = re.compile("|".join(places))
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in our_files()}
    assert not [name for name, text in texts.items() if pattern.search(text)]


def test_what_is_asked_for_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.split(r"[><=!~\[; ]", line)[0].lower() for line in asked}
    assert names <= {name.lower() for name in PINNED}
    assert PINNED["torch"] == "2.13.0"


def test_version_is_said_once_and_the_same():
    source = (ROOT / "attn_plugins" / "__init__.py").read_text(encoding="utf-8")
    version = PROJECT["project"]["version"]
    assert f'__version__ = "{version}"' in source
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
