"""What every benchmark's result says about where it came from, and how it is written."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tolkernels import fast_on_cpu
from tolserve.engine.boot import spin_briefly
from tolserve.study.report import device_name


def machine(device: str = "cpu") -> dict[str, Any]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled_cpu_kernels": fast_on_cpu("bfloat16"),
        "load_before": [round(value, 1) for value in os.getloadavg()],
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *(Path(a).name if a.startswith(("/", "..")) else a for a in sys.argv)]),
    }


def become_engine() -> None:
    """Start this program anew, once, where its compute threads do not wait as those of the engine process do: libgomp
    was told when torch was loaded, which is long ago."""
    if "GOMP_SPINCOUNT" not in os.environ and sys.platform == "linux":
        spin_briefly()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def write(report: dict[str, Any], out: Path | None) -> None:
    """Print the report as JSON, and keep it if `out` is given."""
    text = json.dumps(report, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
