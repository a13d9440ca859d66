"""Write the sparse operators as a project for Hugging Face's kernel-builder: `python tools/hub_kernel.py FOLDER`.

What comes out is a "noarch" kernel, Python and Triton alone, for `kernels.get_kernel`. Its code is this library's own,
changed in the two ways that the Hub asks for: imports are relative, since several versions may be loaded at once under
names of their own, and operators are registered in the namespace that the builder makes up for each build (`_ops`,
which it generates). To build and upload: `kernel-builder build-and-upload` in the folder. The plans need NumPy, which
the Hub's list of allowed dependencies does not have: where NumPy is not installed, the kernel does not load.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "attn_plugins"
NAME = "attn-plugins-ops"
PUBLIC = {
    "block_sparse_attention": "ops.block_sparse",
    "neighborhood_attention": "ops.neighborhood",
    "BlockPlan": "plan.block_plan",
    "Sequence": "sequence",
}

BUILD = """[general]
name = "{name}"
version = 0
edition = 6
license = "Apache-2.0"
backends = ["cuda", "rocm"]

[general.hub]
repo-id = "{repo}"

[torch-noarch]
"""

FLAKE = """{{
  description = "{name}";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = {{ self, kernel-builder }}: kernel-builder.lib.genKernelFlakeOutputs {{ inherit self; path = ./.; }};
}}
"""

CARD = """# {name}

Exact attention over block plans, and neighborhood attention (GNA, NA, sliding tiles) on 1-D to 3-D grids with text
around them, forward and backward, in Triton. Needs NumPy.

    from kernels import get_kernel

    ops = get_kernel("{repo}", version=0, trust_remote_code=True)
    out = ops.neighborhood_attention(q, k, v, grid=(8, 32, 32), window=(3, 9, 9), stride=1)
"""

TEST = '''"""On a GPU: a window that covers everything is plain attention."""

import pytest
import torch

import {module} as kernel


@pytest.mark.kernels_ci
def test_a_full_window_is_plain_attention():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 1, 2, 64, 32, device=device)
    out = kernel.neighborhood_attention(q, k, v, grid=(4, 4, 4), window=-1)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-3, rtol=1e-3)
'''


def source_of(module: str) -> Path:
    """The file of a module that is named without the package."""
    path = ROOT.joinpath(PACKAGE, *module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def needed(modules: set[str]) -> set[str]:
    """The modules, and all of ours that they import, wherever in the file."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _imports(module)
    return found


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            parent = (node.module or "").partition(".")[2]
            for name in node.names:
                child = f"{parent}.{name.name}"
                yield child if source_of(child).is_file() else parent


def rewritten(source: str, module: str) -> str:
    """A module's source with relative imports, and operators in the builder's namespace."""
    inside = module.split(".") if source_of(module).name == "__init__.py" else module.split(".")[:-1]
    up = "." * (len(inside) + 1)
    source = re.sub(rf"(?m)^(\s*)from {PACKAGE}\.?(\S*) import", rf"\1from {up}\2 import", source)
    source, operators = re.subn(rf'(f?)"{PACKAGE}::([^"]*)"', r'add_op_namespace_prefix(\1"\2")', source)
    if operators:
        start = "from __future__ import annotations\n"
        source = source.replace(start, f"{start}\nfrom {up}_ops import add_op_namespace_prefix\n", 1)
    return source


def export(folder: Path, repo: str) -> list[str]:
    """Write the project; returns the modules in it, named without the package.

    Raises:
        FileExistsError: a folder that is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder")
    name = NAME.replace("-", "_")
    package = folder / "torch-ext" / name
    modules = sorted(needed(set(PUBLIC.values())))
    for module in modules:
        target = package / source_of(module).relative_to(ROOT / PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewritten(source_of(module).read_text(encoding="utf-8"), module), encoding="utf-8")
    for part in [path for path in package.rglob("*") if path.is_dir() and not (path / "__init__.py").exists()]:
        (part / "__init__.py").touch()
    lines = [f"from .{home} import {public}" for public, home in sorted(PUBLIC.items())]
    public = ", ".join(f'"{public}"' for public in sorted(PUBLIC))
    (package / "__init__.py").write_text("\n".join(lines) + f"\n\n__all__ = [{public}]\n", encoding="utf-8")
    rows = {"build.toml": BUILD, "flake.nix": FLAKE, "CARD.md": CARD, f"tests/test_{name}.py": TEST}
    for path, text in rows.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.format(name=NAME, repo=repo, module=name), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    return modules


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--repo-id", default=f"your-name/{NAME}", help="where kernel-builder uploads to")
    options = parser.parse_args(arguments)
    modules = export(options.folder, options.repo_id)
    print(f"{len(modules)} modules in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
