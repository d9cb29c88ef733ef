"""Every Triton kernel builds for every GPU generation it is meant for, with Triton's own assembler and no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tolkernels.dispatch import triton_installed

ROOT = Path(__file__).parents[2]
GENERATIONS = {75, 80, 86, 89, 90, 120}
SMALLEST_SHARED = 64 << 10  # what a program may have on the oldest of them


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_kernels_compile_without_spilling(tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / name) for name in ("kernels", "server"))
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # set for the tests beside this one
    command = [sys.executable, "benchmarks/compile_kernels.py", "--brief"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)["kernels"]
    sources = [path.read_text() for path in (ROOT / "kernels" / "tolkernels").glob("*_triton.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)}
    assert len(kernels) >= 9
    expected = {(kernel, sm) for kernel in kernels for sm in GENERATIONS} - {("_matrix_kernel", 75)}
    assert {(kernel["kernel"], kernel["sm"]) for kernel in built} == expected
    assert [kernel for kernel in built if kernel["spilled_bytes"] or kernel["shared_bytes"] > SMALLEST_SHARED] == []
