"""A run whose process is killed, or whose disk is full, while it writes a state: real processes, real signals."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tiny_run import write_texts
from tolserve.cli import main

ROOT = Path(__file__).parents[2]
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), tokenizer)


# A process that the kernel kills in the middle of writing the state of step 10, as if by SIGKILL: no handler runs.
KILLED = """
import resource, signal, sys
from tolserve.cli import main
from tolserve.train.loop import Run

save = Run.save_state

def save_state(run):
    if run.step == 10:
        half = next(run.state_dir.glob("state-*")).stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
    save(run)

Run.save_state = save_state
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
main(sys.argv[1:])
"""


# A process that kills itself as a file NAME takes its place for the COUNTth time: WHEN before or after.
KILLED_AT = """
import os, signal, sys
from tolserve.cli import main

name, count, when = sys.argv[1:4]
replace, seen = os.replace, []

def watched(source, target):
    now = os.path.basename(target) == name and len(seen) + 1 == int(count)
    seen.extend([target] if os.path.basename(target) == name else [])
    if when == "after":
        replace(source, target)
    if now:
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "before":
        replace(source, target)

os.replace = watched
main(sys.argv[4:])
"""


def command(folder: Path, out: Path) -> list[str]:
    """A run that trains its own tokenizer, saves every fifth step and logs every tenth."""
    argv = ["train", "--data", str(folder / "first.txt"), "--out", str(out), "--steps", str(STEPS)]
    argv += shlex.split("--vocab-size 300 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 2 --threads 1")
    return argv + shlex.split("--batch 2 --length 16 --warmup 2 --save-every 5 --device cpu")


def start(folder: Path, out: Path, *program: str, largest: int | None = None) -> subprocess.Popen[str]:
    """No file becomes larger than `largest` bytes: there is no room."""
    argv = [sys.executable, *(program or ("-m", "tolserve")), *command(folder, out)]
    paths = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def limit() -> None:
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    return subprocess.Popen(argv, env=environment, text=True, stderr=subprocess.PIPE, preexec_fn=limit)


def states(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "state").glob("state-*"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(folder, out).communicate(timeout=120)
    return out


def assert_same_tensors(path: Path, other: Path) -> None:
    """The order of their metadata is chance."""
    found, expected = load_file(path), load_file(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def assert_same(out: Path, whole: Path) -> None:
    assert states(out) == states(whole) == [f"state-{STEPS:08d}.safetensors"]
    assert len(list((out / "state").iterdir())) == 3
    assert_same_tensors(*(each / "state" / states(each)[0] for each in (out, whole)))
    rows = [[row.rpartition(",")[0] for row in (each / "loss.csv").read_text().splitlines()] for each in (out, whole)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + STEPS // 10


@pytest.mark.parametrize(
    ("name", "count", "when", "step"),
    [
        ("progress.json", 2, "before", 5),
        ("progress.json", 2, "after", 10),
        ("loss.csv", 2, "before", 15),
        ("figures.json", 1, "before", 20),
    ],
)
def test_a_run_killed_beside_a_save_goes_on(
    folder: Path, tmp_path: Path, whole: Path, name: str, count: int, when: str, step: int
) -> None:
    """`step` is where it goes on."""
    process = start(folder, tmp_path, "-c", KILLED_AT, name, str(count), when)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["step"] == step
    assert not (tmp_path / "figures.json").exists()
    assert main(command(folder, tmp_path)) == 0
    assert_same(tmp_path, whole)
    assert_same_tensors(tmp_path / "model.safetensors", whole / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()
    assert json.loads((tmp_path / "figures.json").read_text())["training_tokens"] == STEPS * 2 * 16


def test_a_run_killed_while_it_saves_goes_on_and_so_does_one_whose_disk_was_full(
    folder: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    process = start(folder, out, "-c", KILLED)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGXFSZ
    kept = "state-00000005.safetensors"
    left = {path.name for path in (out / "state").iterdir()} - {kept, "progress.json", "tokens-0.npy"}
    assert len(left) >= 1  # what it was writing, under a temporary name
    log = (out / "loss.csv").read_text()

    process = start(folder, out, largest=(out / "state" / kept).stat().st_size // 2)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in printed
    assert "state-00000010.safetensors cannot be written" in printed.splitlines()[-1]
    assert states(out) == [kept]
    assert [row.rpartition(",")[0] for row in (out / "loss.csv").read_text().splitlines()] == [
        row.rpartition(",")[0] for row in log.splitlines()
    ]

    process = start(folder, out)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert_same(out, whole)
