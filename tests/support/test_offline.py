"""Compiling without a GPU: what is recorded, what is refused, and what the binary says of spills and tensor cores."""

import json
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from tests.support.interpreter import interpreting  # noqa: E402
from tests.support.offline import TARGETS, environment, offline  # noqa: E402
from tests.support.resources import resources  # noqa: E402


@triton.jit
def product(a, b, out, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row, column, deep = tl.arange(0, ROWS), tl.arange(0, ROWS), tl.arange(0, DEPTH)
    left = tl.load(a + row[:, None] * DEPTH + deep[None, :])
    right = tl.load(b + deep[:, None] * ROWS + column[None, :])
    tl.store(out + row[:, None] * ROWS + column[None, :], tl.dot(left, right, input_precision="ieee"))


def launch(rows=64, depth=64, dtype=torch.float16, warps=4):
    shapes = ((rows, depth), (depth, rows), (rows, rows))
    a, b, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    product[(1,)](a, b, out.float(), rows, depth, num_warps=warps, enable_fp_fusion=True)


def measured(target, **options):
    with offline(target) as kernels:
        launch(**options)
    return vars(resources(kernels[0]))


def experiments():
    """Everything that needs a process without the interpreter, as plain values."""
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    found = {target: measured(target) for target in TARGETS}
    found["float32"] = measured("sm_90", dtype=torch.float32)
    found["spilling"] = measured("sm_80", dtype=torch.float32, warps=1)
    with offline("sm_90") as kernels:
        launch()
        launch()
        launch(rows=32)
    found["names, one block"] = [kernel.name for kernel in kernels]
    with offline("sm_90") as kernels:
        launch()
    found["names, once more"] = [kernel.name for kernel in kernels]
    try:
        with offline("sm_89"):
            launch(rows=32, depth=1024)
    except OutOfResources as error:
        found["too large"] = str(error)
    found["driver afterwards"] = driver._active is None
    return found


@pytest.fixture(scope="module")
def found(request):
    code = "import json; from tests.support.test_offline import experiments; print(json.dumps(experiments()))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    root = request.config.rootpath
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles_and_half_precision_is_on_tensor_cores(found, target):
    assert found[target]["tensor_core"] > 0 and found[target]["registers"] > 0 and found[target]["spills"] == 0


def test_exact_float32_is_not_on_tensor_cores(found):
    assert found["float32"]["tensor_core"] == 0 and found["float32"]["shared"] > 0


def test_a_spill_is_seen(found):
    assert found["spilling"]["spills"] > 0 and found["spilling"]["registers"] >= 200


def test_each_different_launch_is_recorded_once_in_every_block(found):
    assert found["names, one block"] == ["product", "product"] and found["names, once more"] == ["product"]


def test_the_targets_shared_memory_is_the_limit(found):
    assert "shared memory" in found["too large"] and "101376" in found["too large"]


def test_the_driver_is_as_before(found):
    assert found["driver afterwards"]


def test_interpreted_kernels_are_refused():
    if not interpreting():
        pytest.skip("the kernels of this process are not interpreted")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), offline("sm_90"):
        pass
