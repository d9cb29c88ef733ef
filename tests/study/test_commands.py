"""`tolserve study NAME` from outside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import TEXT
from tolserve.cli import main
from tolserve.model.config import FfnVariant
from tolserve.study import settings
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
        (["--text", "/nowhere.txt", "--pairs", "5"], 2, "--pairs is for --blimp"),
        (["--blimp", "/nowhere.zip", "--tokens", "5"], 2, "--tokens is for --text"),
        (["--blimp", "/nowhere.zip", "--length", "5"], 2, "--length is for --text"),
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


def test_help_says_where_a_study_runs() -> None:
    studies = [study for study in settings.StudyOptions.__subclasses__() if study is not settings.TaskOptions]
    for study in [*studies, *settings.TaskOptions.__subclasses__()]:
        assert "device" in study.model_fields or "Runs on the CPU." in str(study.__doc__)


def test_calibration_has_a_length_without_a_text() -> None:
    given = {"model": [Path("m")], "out": Path("o"), "blimp": Path("b.zip"), "calibration": Path("c.txt")}
    assert settings.StudyPruneSettings(**given, length=64).length == 64
    with pytest.raises(ValueError, match="--tokens is for --text"):
        settings.StudyPruneSettings(**given, tokens=64)
