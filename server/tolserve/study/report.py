"""What every study returns, and how it is kept: JSON with everything, a table for people, a picture."""

import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tolserve import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
_DIGITS = 5  # perplexities are compared in the third decimal


class StudyError(ValueError):
    """A study that cannot be made of what it was given; the message says what to change."""


@dataclass(frozen=True)
class Study:
    """`facts`: models, scale, texts, seed, command, versions. `rows`: the table, one dict a row, all with the same
    keys. `extra`: whatever else belongs into the JSON. `notes`: lines for people, behind the table."""

    name: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def provenance(seed: int | None = None) -> dict[str, Any]:
    """The facts that all studies share. `seed` None: nothing in the study is random."""
    program, *arguments = sys.argv or ["python"]
    name = Path(program).name.replace("__main__.py", "tolserve")  # `python -m tolserve`
    words = [name, *(Path(word).name if word.startswith(("/", "..")) else word for word in arguments)]
    return {
        "command": shlex.join(words),
        "seed": seed,
        "versions": {"tolserve": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    """Of "cuda" the GPU's, else the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def require(*packages: str) -> None:
    """Raises StudyError where a package of the extra `study` is not installed: before the work, not behind it."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise StudyError(f"{' and '.join(missing)} is not installed; `pip install tolserve[study]` brings it")


def write(study: Study, out: Path, draw: "Callable[[Figure], None] | None") -> list[Path]:
    """Write NAME.json, NAME.md and, with `draw`, NAME.png into the folder `out`; returns their paths.

    Raises StudyError where a picture is asked for and matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{study.name}.json", out / f"{study.name}.md"]
    paths[0].write_text(json.dumps(asdict(study), indent=2) + "\n")
    paths[1].write_text(_markdown(study.rows) + "".join(f"\n{note}\n" for note in study.notes))
    if draw is not None:
        require("matplotlib")
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")  # without pyplot, which keeps figures in the module
        draw(figure)
        paths.append(out / f"{study.name}.png")
        figure.savefig(paths[-1], dpi=_DPI)
    return paths


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned table for a terminal."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [isinstance(value, int | float) for value in rows[0].values()]
    lines = []
    for line in cells:
        parts = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
