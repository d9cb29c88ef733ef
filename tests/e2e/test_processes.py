"""Failing to start, and the engine under another command than `serve`."""

import json
import shutil
import subprocess
from pathlib import Path

from e2e.conftest import environment, tolserve


def test_a_server_whose_engine_cannot_start_ends_and_says_why(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"nonsense")
    argv = tolserve("serve", str(broken), "--port", "0", "--cache-dir", str(tmp_path / "cache"))
    ended = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=110)
    assert ended.returncode == 1
    assert "model.safetensors" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_generate(model_dir: Path, tmp_path: Path) -> None:
    options = ["-p", "The old house", "--max-tokens", "5", "--seed", "1", "--cache-dir", str(tmp_path), "--json"]
    argv = tolserve("generate", str(model_dir), *options)
    ended = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["prompt"] == "The old house"
    assert answer["usage"]["completion_tokens"] <= 5
