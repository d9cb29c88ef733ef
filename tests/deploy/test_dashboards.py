"""The dashboards show data: every expression, evaluated by a real Prometheus that scrapes a real server under load."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from panels import DEPLOY, Prometheus, Traffic, check, lines, prometheus
from tokenizers import Tokenizer

from e2e.conftest import KEY, Running

GRAFANA = DEPLOY / "grafana"
LOAD_SECONDS = 15  # more than the 10 seconds that a rate looks back
SLOW_MACHINE_SECONDS = 90


def without_data(source: Prometheus) -> dict[str, object]:
    return {name: panel["series"] for name, panel in check(source).items() if not panel["data"]}


def test_every_panel_has_data_under_load(
    tool: Callable[[str], str], start_server: Callable[..., Running], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    binary = tool("prometheus")
    # Small tiers, so that records come from the disk and from host memory, and leave both.
    server = start_server("--device-cache", "48", "--host-cache", "96").wait_ready()
    address = server.url.removeprefix("http://")
    with (
        prometheus(binary, tmp_path, address, KEY) as source,
        Traffic(server.url, "tiny", tokenizer.get_vocab_size(), KEY) as traffic,
    ):
        time.sleep(LOAD_SECONDS)
        deadline = time.monotonic() + SLOW_MACHINE_SECONDS
        while (empty := without_data(source)) and time.monotonic() < deadline:
            time.sleep(1)
        assert len(check(source)) > 30
        assert not empty, json.dumps(empty, indent=1)
        assert source.firing() == set()
        for source_name in ("host", "disk"):
            assert all(source.values(f'tolserve_tol_fills_total{{source="{source_name}",cause="demand"}} > bool 0'))
        assert all(source.values("tolserve_tol_evictions_total > bool 0"))
    assert len(traffic.statuses) > 20
    assert set(traffic.statuses) == {200}


def test_the_json_is_what_the_program_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(GRAFANA / "dashboards.py"), str(tmp_path)], check=True)
    for name in ("cache.json", "serving.json"):
        assert (tmp_path / name).read_text() == (GRAFANA / "dashboards" / name).read_text(), "run dashboards.py again"


def test_panels_explain_themselves_and_do_not_overlap() -> None:
    for path in (GRAFANA / "dashboards").glob("*.json"):
        board = json.loads(path.read_text())
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            assert len(panel["description"]) > 40, panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24, panel["title"]
            taken |= cells
        legends = [(panel["title"], target["refId"]) for panel in board["panels"] for target in panel["targets"]]
        assert len(legends) == len(set(legends))


def test_no_variable_is_left_in_an_expression() -> None:
    assert lines()
    assert [line for line in lines() if "$" in line.expression] == []
