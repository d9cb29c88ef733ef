"""What a study leaves behind: JSON that holds all of it, a table, a picture."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tolserve.study.report import Study, StudyError, provenance, render, require, write

STUDY = Study(
    "try", {"model": "m"}, [{"name": "one", "ppl": 24.3481, "bytes": 1234}, {"name": "b", "ppl": None, "bytes": 5}]
)


def test_json_holds_everything_and_the_table_is_markdown(tmp_path: Path) -> None:
    paths = write(STUDY, tmp_path / "deep" / "out", None)
    assert [path.name for path in paths] == ["try.json", "try.md"]
    assert json.loads(paths[0].read_text()) == asdict(STUDY)
    assert paths[1].read_text() == (
        "| name | ppl | bytes |\n| --- | --- | --- |\n| one | 24.348 | 1,234 |\n| b | - | 5 |\n"
    )


def test_notes_stand_behind_the_table(tmp_path: Path) -> None:
    paths = write(replace(STUDY, rows=STUDY.rows[:1], notes=["first note", "second"]), tmp_path, None)
    assert paths[1].read_text().endswith("| one | 24.348 | 1,234 |\n\nfirst note\n\nsecond\n")


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    def draw(figure: Figure) -> None:
        figure.subplots().plot([1, 2], [3, 4])

    first, second = (write(STUDY, tmp_path / name, draw)[-1] for name in ("a", "b"))
    assert first.name == "try.png"
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")


def test_a_terminal_table_is_aligned() -> None:
    assert render(STUDY.rows).splitlines() == ["name     ppl  bytes", "one   24.348  1,234", "b          -      5"]
    assert render([]) == ""


def test_a_missing_package_is_named_with_its_remedy() -> None:
    require("json")
    with pytest.raises(StudyError, match=r"no_such_thing.*pip install tolserve\[study\]"):
        require("json", "no_such_thing")


def test_where_a_result_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/tolserve", "study", "alpha", "/home/me/model", "runs/x"])
    facts = provenance(seed=3)
    assert facts["command"] == "tolserve study alpha model runs/x"
    assert facts["seed"] == 3
    assert {"tolserve", "python", "torch"} <= facts["versions"].keys()
