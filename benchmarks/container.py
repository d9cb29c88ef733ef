"""Build the image and run it as it is meant to be run: how large, how long, and what it may do.

    python benchmarks/container.py --build '--build-arg BASE_IMAGE=python:3.11-slim' --out results/container.json

The container gets a read-only root, /tmp in memory, no capabilities, no new privileges and 2 GB. The sources are built
from a copy, once from nothing and once after a change of one source file. It runs podman, and takes port 8000.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from report import machine, write

ROOT = Path(__file__).parents[1]
IMAGE = "localhost/tolserve-check"
NAME = "tolserve-check"
CONFINED = "--read-only --tmpfs /tmp --cap-drop all --security-opt no-new-privileges --memory 2g"
START_SECONDS = 120
# Printed inside, by the server's own user: who it is, what it may do, and what it wrote.
INSIDE = """
import json, os, pathlib
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
try:
    open("/app/probe", "w")
    root = "writable"
except OSError as error:
    root = error.strerror
print(json.dumps({
    "uid": os.getuid(),
    "process_1": open("/proc/1/cmdline").read().split(chr(0))[1].rsplit("/", 1)[-1],
    "capabilities": status["CapEff"].strip(),
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "root": root,
    "files_in_tmp": sorted(str(path) for path in pathlib.Path("/tmp").rglob("*") if not path.is_dir()),
    "resident_mib": sum(
        int(line.split()[1]) >> 10
        for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()
        for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS")
    ),
}))
"""


def podman(*argv: str) -> str:
    """Standard output; raises CalledProcessError when it fails."""
    return subprocess.run(["podman", *argv], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def copied(to: Path) -> Path:
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "setup.py", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, to / name)
    for name in ("server", "kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def build(options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        context = copied(Path(folder))
        started = time.monotonic()
        podman("build", "--no-cache", *options, "-t", IMAGE, str(context))
        cold = time.monotonic() - started
        with (context / "server" / "tolserve" / "cli.py").open("a") as file:
            file.write("# A change.\n")
        started = time.monotonic()
        podman("build", *options, "-t", IMAGE, str(context))
        changed = time.monotonic() - started
    layers = json.loads(podman("history", "--format", "json", IMAGE))
    return {
        "image_mib": int(podman("image", "inspect", "--format", "{{.Size}}", IMAGE)) >> 20,
        "layers_mib": [layer["size"] >> 20 for layer in layers if layer["size"] >> 20],
        "build_seconds_cold": round(cold, 1),
        "build_seconds_after_a_source_change": round(changed, 1),
    }


def run(options: list[str], url: str) -> dict[str, Any]:
    started = time.monotonic()
    podman("run", "-d", "--name", NAME, "-p", "8000:8000", *shlex.split(CONFINED), *options, IMAGE)
    try:
        found: dict[str, Any] = {"flags": CONFINED}
        found["seconds_to_healthy"] = wait(f"{url}/health", started)
        found["seconds_to_ready"] = wait(f"{url}/ready", started)
        podman("healthcheck", "run", NAME)
        found["healthcheck"] = "ok"
        body = {"model": "demo_model", "prompt": "The old man said", "max_tokens": 16, "temperature": 0}
        asked = time.monotonic()
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        found["completion"] = answer["choices"][0]["text"]
        found["completion_seconds"] = round(time.monotonic() - asked, 2)
        found["inside"] = json.loads(podman("exec", NAME, "python3", "-c", INSIDE))
        started = time.monotonic()
        podman("stop", "-t", "35", NAME)
        found["stop_seconds"] = round(time.monotonic() - started, 1)
        found["exit_status"], found["out_of_memory"] = json.loads(
            podman("inspect", NAME, "--format", "[{{.State.ExitCode}}, {{.State.OOMKilled}}]")
        )
        return found
    finally:
        podman("rm", "-f", NAME)


def wait(url: str, started: float) -> float:
    """Seconds from `started` until the route answers 200."""
    while time.monotonic() < started + START_SECONDS:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return round(time.monotonic() - started, 1)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{url} did not answer within {START_SECONDS} s; see `logs {NAME}`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="", help="options for the build, in one string")
    parser.add_argument("--run", default="", help="further options for the run, in one string")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = build(shlex.split(args.build)) | run(shlex.split(args.run), args.url)
    # Without the options: they name places of one machine.
    write(machine() | {"command": "python container.py"} | report, args.out)
