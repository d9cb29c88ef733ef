"""`tolserve study NAME` from outside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import TEXT
from tolserve.cli import main
from tolserve.model.config import FfnVariant
from tolserve.study.evaluate import Studied

StudiedOf = Callable[[FfnVariant], Studied]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alpha", ["--alphas", "1,0.5"]),
        ("drop-layer", []),
        ("quantize", ["--group-size", "8"]),
        ("lowrank", ["--cuts", "0.5", "--energies", "0.9,0.5"]),
    ],
)
def test_a_study_leaves_three_files(
    name: str,
    options: list[str],
    studied_of: StudiedOf,
    text: Path,
    blimp_zip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    model = studied_of("memory").path
    argv = ["study", name, str(model), "--text", str(text), "--blimp", str(blimp_zip), "--pairs", "1"]
    argv += ["--length", "32", "--out", str(out), *options]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / f"{name}.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.{kind}" for kind in ("json", "md", "png")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert next(iter(printed["rows"][0])) in shown
    assert f"{name}.png" in shown


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--alphas", "x"], 2, "--alphas"),
        ([], 1, "--text"),
        (["--text", "/nowhere.txt"], 1, "/nowhere.txt"),
        (["--blimp", "/nowhere.zip"], 1, "/nowhere.zip"),
    ],
)
def test_wrong_options_end_with_one_line(
    words: list[str],
    status: int,
    said: str,
    studied_of: StudiedOf,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["study", "alpha", str(studied_of("base").path), "--out", str(tmp_path / "out"), *words]) == status
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()
