"""What the engine process does before torch is loaded."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from tolserve.engine.boot import spin_briefly

spin_briefly()
seen = "import os; print(os.environ.get('GOMP_SPINCOUNT'), end='')"
os.execv(sys.executable, [sys.executable, "-c", seen])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(("given", "seen"), [(None, "30000"), ("7", "7")])
def test_compute_threads_spin_briefly_unless_told_otherwise(given: str | None, seen: str) -> None:
    """Whoever reads the environment in C, as libgomp does, and as a program does that is started."""
    told = {} if given is None else {"GOMP_SPINCOUNT": given}
    environment = {"PYTHONPATH": ":".join(sys.path)} | told
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == seen
