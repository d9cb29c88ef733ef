"""Several processes train one model: the same result as one, and exact resume, with real processes under torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tiny_run import write_texts
from tolserve.cli import main
from tolserve.train.ranks import join
from tolserve.train.recipe import TrainError

ROOT = Path(__file__).parents[2]
STEPS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), tokenizer)


def options(folder: Path, out: Path) -> list[str]:
    given = {"data": folder / "first.txt", "held-out": folder / "unseen.txt", "tokenizer": folder / "tokenizer.json"}
    shape = {"vocab-size": 300, "hidden-size": 16, "intermediate-size": 24, "num-hidden-layers": 2, "threads": 1}
    recipe = {"batch": 4, "accumulate": 2, "length": 16, "steps": STEPS, "warmup": 2, "save-every": 5}
    named = given | {"out": out, "device": "cpu"} | shape | recipe
    return ["train", *(word for name, value in named.items() for word in (f"--{name}", str(value)))]


def processes(folder: Path, out: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tolserve"]
    paths = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv += options(folder, out)
    return subprocess.Popen(argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(group: subprocess.Popen[str]) -> str:
    out, err = group.communicate(timeout=120)
    assert group.returncode == 0, err
    return out


def state(out: Path) -> dict[str, Tensor]:
    return load_file(out / "state" / f"state-{STEPS:08d}.safetensors")


def losses(out: Path) -> list[str]:
    return [row.rpartition(",")[0] for row in (out / "loss.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def of_two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    printed = finish(processes(folder, out))
    assert printed.count("training_tokens") == 1  # one process speaks
    return out


def test_two_processes_train_what_one_does(folder: Path, tmp_path: Path, of_two: Path) -> None:
    """Up to the order of summation, which 200 steps let grow a little."""
    assert main([*options(folder, tmp_path), "--accumulate", "4"]) == 0
    pairs = list(zip(losses(tmp_path)[1:], losses(of_two)[1:], strict=True))
    assert len(pairs) == STEPS // 10
    for alone, together in pairs:
        assert float(alone.split(",")[2]) == pytest.approx(float(together.split(",")[2]), abs=2e-3)
    assert torch.allclose(
        state(tmp_path)["model.embed_tokens.weight"], state(of_two)["model.embed_tokens.weight"], atol=0.02
    )


def test_two_stopped_processes_go_on_to_the_same_weights(folder: Path, tmp_path: Path, of_two: Path) -> None:
    group = processes(folder, tmp_path)
    while not (tmp_path / "state" / "progress.json").exists():
        assert group.poll() is None, group.communicate()
        time.sleep(0.01)
    group.send_signal(signal.SIGTERM)
    group.communicate(timeout=60)
    assert group.returncode != 0
    assert not (tmp_path / "state" / f"state-{STEPS:08d}.safetensors").exists()
    finish(processes(folder, tmp_path))
    assert losses(tmp_path) == losses(of_two)
    assert state(tmp_path).keys() == state(of_two).keys()
    assert all(torch.equal(tensor, state(of_two)[name]) for name, tensor in state(tmp_path).items())


def test_processes_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first one's tokenising, which torch's own limit would cut off."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    given = {"TORCHELASTIC_RUN_ID": "one", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    with join("cpu"):
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout >= timedelta(hours=12)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(TrainError, match="--device cuda"), join("cuda"):
        pass
    with join("auto") as alone:
        assert (alone.device.type, alone.rank, alone.size, alone.first) == ("cpu", 0, 1, True)
