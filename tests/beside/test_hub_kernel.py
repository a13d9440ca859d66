"""The export for Hugging Face's kernels: it imports by itself, twice beside each other, and computes the same."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attn_plugins.ops import neighborhood_attention
from tests.support.tiny import randn

ALLOWED = {"torch", "triton", "numpy"}
OPS = """import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(name: str) -> str:
    return f"{id}::{{name}}"
"""


@pytest.fixture(scope="module")
def tool(pytestconfig: pytest.Config) -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_kernel", pytestconfig.rootpath / "tools" / "hub_kernel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    assert tool.main([str(folder), "--repo-id", "someone/attention"]) == 0
    return folder


def load(project: Path, unique: str) -> Any:
    """As `kernels.get_kernel` does: from its folder, under a name of its own, with the builder's `_ops`."""
    package = project / "torch-ext" / "attn_plugins_ops"
    (package / "_ops.py").write_text(OPS.format(id=unique), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        unique, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[unique] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(project: Path) -> Iterator[list[Any]]:
    names = ["_attn_plugins_ops_cuda_1a2b3c4", "_attn_plugins_ops_cuda_5d6e7f8"]
    yield [load(project, name) for name in names]
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]


def test_the_layout_is_the_builders(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    build = tomllib.loads((project / "build.toml").read_text(encoding="utf-8"))
    assert build["general"]["name"].replace("-", "_") == "attn_plugins_ops" and "torch-noarch" in build
    assert build["general"]["hub"]["repo-id"] == "someone/attention"
    for path in ("flake.nix", "CARD.md", "LICENSE", "tests/test_attn_plugins_ops.py"):
        assert (project / path).read_text(encoding="utf-8").strip()
    compile((project / "tests/test_attn_plugins_ops.py").read_text(encoding="utf-8"), "test", "exec")


def test_it_imports_itself_relatively_and_little_else(project: Path) -> None:
    for path in (project / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            foreign = {name.split(".")[0] for name in names} - ALLOWED - sys.stdlib_module_names
            assert not foreign, f"{path.name} imports {foreign}"


def test_all_of_it_imports_and_no_name_is_shared(kernels: list[Any]) -> None:
    pytest.importorskip("triton")
    for kernel in kernels:
        for row in pkgutil.walk_packages(kernel.__path__, f"{kernel.__name__}."):
            importlib.import_module(row.name)
        assert not hasattr(torch.ops.attn_plugins, kernel.__name__)
        assert hasattr(getattr(torch.ops, kernel.__name__), "neighborhood")
    assert kernels[0].BlockPlan is not kernels[1].BlockPlan


def test_it_computes_what_the_library_does(kernels: list[Any]) -> None:
    q, k, v = (randn(2, 3, 60 + 4, 16, seed=seed).requires_grad_() for seed in range(3))
    setting: dict[str, Any] = {"grid": (3, 4, 5), "window": (3, 3, 2), "stride": (1, 2, 1), "text_before": 4}
    expected = neighborhood_attention(q, k, v, **setting)
    (gradient,) = torch.autograd.grad(expected.square().sum(), q)
    for kernel in kernels:
        out = kernel.neighborhood_attention(q, k, v, **setting)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], gradient)


def test_a_folder_in_use_is_left_alone(tool: ModuleType, project: Path) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        tool.export(project, "someone/attention")
