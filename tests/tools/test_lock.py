"""The codegen lock: named kernels compiled again and compared, and proof that the comparison sees what it must."""

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.support.codegen import TARGETS, Case, Line, cases, changes, faults, read_lock, write_lock
from tests.support.offline import environment

NAMES = [
    *(f"decode/{target}/bf16/128" for target in ("sm_90", "gfx942")),
    "decode/sm_90/fp32/256",
    "decode/sm_90/fp16/128",
    "decode, 32 rows/sm_100/bf16/128",
    *(f"block sparse, windows/{target}/bf16/64" for target in ("sm_90", "gfx942")),
    "block sparse, windows/sm_80/bf16/128",
    *(f"block sparse, whole blocks/{target}/bf16/128" for target in ("sm_89", "gfx950")),
    "block rows/sm_90/bf16/128",
    "block rows, causal/gfx942/bf16/128",
    "block gate/sm_80/bf16/128",
    "agent, biases/sm_80/bf16/128",
    "agent/sm_120/bf16/80",
    "agent/sm_90/fp32/128",
    "weighted merge/sm_90/bf16/64",
    "weighted merge, long/gfx942/bf16/64",
    "routed heads, causal/sm_90/bf16/128",
    "routed heads, for a backward/sm_120/bf16/64",
]
PARTS = 5  # so that several workers share the longest test


def run(*arguments, root, **more):
    command = [sys.executable, "tools/lock.py", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment() | more, timeout=500)


@pytest.mark.parametrize("part", range(PARTS))
def test_named_kernels_are_as_locked(part, pytestconfig):
    pytest.importorskip("triton")
    names = NAMES[part::PARTS]
    done = run("--check", "--jobs", "1", *names, root=pytestconfig.rootpath)
    assert done.returncode == 0, f"{done.stderr}\nIf the kernels were meant to change: make lock"
    assert f"of {len(names)} cases compiled" in done.stdout


LINE = Line("decode", "sm_90", "bf16", 128, "attend_share", "KEYS=32 warps=8 stages=3", 104, 0, 38_912, 12)


def test_a_spill_is_a_fault_under_any_version():
    assert not faults([LINE])
    assert "4 spills with KEYS=32" in faults([replace(LINE, spills=4)])[0]


def test_more_shared_memory_than_the_target_has_is_a_fault():
    assert not faults([replace(LINE, shared=TARGETS["sm_90"][3])])
    assert "the target has 101376" in faults([replace(LINE, target="sm_89", shared=101_377)])[0]


def test_fusion_that_is_left_to_the_version_is_a_fault():
    assert "without the OPTIONS" in faults([replace(LINE, config=f"{LINE.config} unfused")])[0]


@pytest.mark.parametrize("change", [{"tensor_core": 0}, {"registers": 105}, {"shared": 1}, {"config": "KEYS=64"}])
def test_any_difference_is_told(change):
    assert not changes([LINE], [LINE])
    told = changes([replace(LINE, **change)], [LINE])
    assert len(told) == 2 and told[0].startswith("now:") and told[1].startswith("locked:")


def test_a_kernel_that_came_or_went_is_told_but_cases_that_were_not_compiled_are_not():
    other = replace(LINE, kernel="combine_shares")
    assert changes([LINE, other], [LINE]) and changes([LINE], [LINE, other])
    assert not changes([LINE], [LINE, replace(LINE, head_dim=64)])


def test_the_file_holds_the_lines(tmp_path):
    write_lock("3.9.0", [LINE, replace(LINE, registers=1)], tmp_path / "lock.csv")
    assert read_lock(tmp_path / "lock.csv") == ("3.9.0", [replace(LINE, registers=1), LINE])


def test_the_lock_is_whole():
    """Every case of the table is there, no kernel spills, and half precision is on tensor cores."""
    version, lines = read_lock()
    assert version and {line.case for line in lines} == set(cases())
    assert not [line for line in lines if line.spills] and not faults(lines)
    plain = ("combine_shares", "delta_kernel", "list_kernel", "pool_kernel", "choose_references", "combine_spread")
    plain += ("best_kernel", "scores_kernel")  # products of float32 in full
    assert not [line for line in lines if line.dtype != "fp32" and line.kernel not in plain and not line.tensor_core]


def test_a_case_that_is_not_in_the_table(pytestconfig):
    done = run("--check", "decode/sm_70/bf16/128", root=pytestconfig.rootpath)
    assert done.returncode == 1 and "is not in the table" in done.stderr
    assert Case("decode", "sm_70", "bf16", 128) not in cases()
