"""The rules: valid, tested, and firing when a real server has the fault that they are for."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from panels import DEPLOY, Prometheus, prometheus

from e2e.conftest import KEY, Running
from e2e.test_lifecycle import engine_of
from tolserve.model.build import build_table
from tolserve.tol.table import Table

FOLDER = DEPLOY / "prometheus"
RUNBOOK = DEPLOY.parent / "docs" / "operations.md"
RULES = sorted(map(str, (FOLDER / "rules").glob("*.yml")))
UNIT_TESTS = sorted(map(str, (FOLDER / "tests").glob("*.yml")))
ALERTS = [
    rule
    for path in RULES
    for group in yaml.safe_load(Path(path).read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]


def run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration_and_the_rules(tool: Callable[[str], str], tmp_path: Path) -> None:
    promtool = tool("promtool")
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULES)
    shutil.copytree(FOLDER, tmp_path / "prometheus")
    config = tmp_path / "prometheus" / "prometheus.yml"
    # The key lies where compose.yaml mounts it; here there is none.
    key = tmp_path / "key"
    key.write_text(KEY)
    config.write_text(config.read_text().replace("/run/secrets/api_key", str(key)))
    run(promtool, "check", "config", "--lint=all", "--lint-fatal", str(config))
    # With the Alertmanager that is commented out.
    text = re.sub(r"^# (?=alerting:| )", "", config.read_text(), flags=re.MULTILINE)
    assert yaml.safe_load(text)["alerting"]["alertmanagers"]
    config.write_text(text)
    run(promtool, "check", "config", "--lint=all", "--lint-fatal", str(config))


def test_promtool_finds_the_alerts_right(tool: Callable[[str], str]) -> None:
    run(tool("promtool"), "test", "rules", *UNIT_TESTS)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases: defaultdict[str, set[bool]] = defaultdict(set)
    for path in UNIT_TESTS:
        for group in yaml.safe_load(Path(path).read_text())["tests"]:
            for case in group["alert_rule_test"]:
                cases[case["alertname"]].add(bool(case["exp_alerts"]))
    missing = {rule["alert"] for rule in ALERTS if cases[rule["alert"]] != {True, False}}
    assert not missing


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = [line for line in (DEPLOY.parent / page).read_text().splitlines() if line.startswith("#")]
    assert anchor in {heading.lstrip("# ").lower().replace(":", "").replace(" ", "-") for heading in headings}


def wait_until_firing(source: Prometheus, alert: str) -> None:
    deadline = time.monotonic() + 60
    while alert not in source.firing():
        assert time.monotonic() < deadline, f"{alert} does not fire"
        time.sleep(0.2)


def wait_until_scraped(source: Prometheus, metric: str) -> None:
    """A counter must have been seen before it moves, or there is no increase."""
    deadline = time.monotonic() + 60
    while not source.values(f"count_over_time({metric}[1m]) > 1"):
        assert time.monotonic() < deadline, f"{metric} is not scraped"
        time.sleep(0.2)


def test_flipped_bits_in_the_table_raise_the_alarm(
    tool: Callable[[str], str], start_server: Callable[..., Running], model_dir: Path, tmp_path: Path
) -> None:
    binary = tool("prometheus")
    build_table(model_dir, tmp_path / "table")
    shutil.copytree(tmp_path / "table", tmp_path / "copy")
    server = start_server("--table", str(tmp_path / "table"), "--device-cache", "48").wait_ready()
    with prometheus(binary, tmp_path, server.url.removeprefix("http://"), KEY) as source, server.http() as client:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200
        wait_until_scraped(source, "tolserve_tol_read_errors_total")
        wait_until_scraped(source, 'tolserve_request_failure_total{kind="table"}')
        assert source.firing() == set()
        for shard in Table.open(tmp_path / "table").manifest.shards:
            path = tmp_path / "table" / shard.file
            good = path.read_bytes()
            with path.open("r+b") as file:
                file.seek(shard.data_start)
                file.write(bytes(byte ^ 1 for byte in good[shard.data_start :]))
                os.fsync(file.fileno())
        failed = client.post("/v1/completions", json=body | {"prompt": [50, 60, 70]})
        assert failed.status_code == 500
        assert server.metric("tolserve_tol_read_errors_total") > 0
        wait_until_firing(source, "TolserveReadErrors")
        wait_until_firing(source, "TolserveRequestsFailForRecords")
        # What the runbook says to do, while the server runs.
        (command,) = re.findall(r"`dd if=COPY/FILE of=TABLE/FILE ([^`]*)`", RUNBOOK.read_text())
        for shard in Table.open(tmp_path / "copy").manifest.shards:
            paths = [f"if={tmp_path / 'copy' / shard.file}", f"of={tmp_path / 'table' / shard.file}"]
            run("dd", *paths, *command.split())
        assert client.post("/v1/completions", json=body | {"prompt": [50, 60, 70]}).status_code == 200


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the engine in /proc")
def test_a_killed_engine_raises_the_alarm(
    tool: Callable[[str], str], start_server: Callable[..., Running], tmp_path: Path
) -> None:
    binary = tool("prometheus")
    server = start_server().wait_ready()
    with prometheus(binary, tmp_path, server.url.removeprefix("http://"), KEY) as source:
        wait_until_scraped(source, "tolserve_engine_restarts_total")
        assert source.firing() == set()
        os.kill(engine_of(server), signal.SIGKILL)
        wait_until_firing(source, "TolserveEngineRestarted")
        server.wait_ready()
