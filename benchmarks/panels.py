"""Do the shipped dashboards show data? Every panel's expressions, evaluated by a real Prometheus under load.

    tolserve serve --device-cache 10% --host-cache 10% &
    python benchmarks/panels.py --seconds 60 --out results/panels.json

Prometheus (the program, on PATH) scrapes the server each second with the shipped rules, while clients send
completions. A panel passes if each of its lines has at least one series and all values are finite. How Grafana draws
them is not checked.
"""

import argparse
import json
import math
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from report import machine, write

DEPLOY = Path(__file__).parents[1] / "deploy"
JOB = "tolserve"
# A rate needs two scrapes; ten of them smooth it, and a panel shows data soon after the start.
VARIABLES = {"$__rate_interval": "10s", "$job": JOB, "$instance": ".*"}
LONGEST_ANSWER = 48
NO_ANSWER = 0


@dataclass(frozen=True)
class Line:
    """One expression of a panel, with Grafana's variables replaced."""

    dashboard: str
    panel: str
    legend: str
    expression: str


def lines(folder: Path = DEPLOY / "grafana" / "dashboards") -> list[Line]:
    """Every expression of every dashboard in the folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"]
                for name, value in VARIABLES.items():
                    expression = expression.replace(name, value)
                found.append(Line(path.stem, panel["title"], target["legendFormat"], expression))
    return found


class Prometheus:
    """A running Prometheus' HTTP API. Raises RuntimeError with its own words for an expression that it refuses."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        if answer["status"] != "success":
            raise RuntimeError(answer["error"])
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """The value of every series of an expression, now."""
        return [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {a["labels"]["alertname"] for a in self.get("alerts")["alerts"] if a["state"] == "firing"}


def configuration(address: str, key: str | None) -> dict[str, Any]:
    """The shipped rules; one scrape and one evaluation a second."""
    scrape: dict[str, Any] = {"job_name": JOB, "static_configs": [{"targets": [address]}]}
    if key is not None:
        scrape["authorization"] = {"credentials": key}
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "rules" / "*.yml")],
        "scrape_configs": [scrape],
    }


@contextmanager
def prometheus(binary: str, folder: Path, address: str, key: str | None = None) -> Iterator[Prometheus]:
    """Prometheus on a free port, scraping the server at `address` (host:port); its data lies in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(configuration(address, key)))
    argv = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={listen}"]
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen([binary, *argv], stderr=log) as process:
        try:
            _wait_until_ready(f"http://{listen}/-/ready", process, folder / "prometheus.log")
            yield Prometheus(f"http://{listen}")
        finally:
            process.terminate()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"prometheus did not start: {log.read_text()[-2000:]}")


class Traffic:
    """Clients in threads that send streamed and plain completions of random tokens, the low ids more often than the
    high ones, until the `with` block ends."""

    def __init__(self, url: str, model: str, tokens: int, key: str | None = None, clients: int = 4) -> None:
        self._url, self._model, self._tokens = url, model, tokens
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(clients)]
        self.statuses: list[int] = []

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=60) as http:
            while not self._stop.is_set():
                prompt = [int(self._tokens * rng.random() ** 3) for _ in range(rng.randrange(4, 40))]
                body = {
                    "model": self._model,
                    "prompt": prompt,
                    "max_tokens": rng.randrange(2, LONGEST_ANSWER),
                    "ignore_eos": True,
                    "seed": rng.randrange(2**31),
                    "stream": rng.random() < 0.5,
                }
                try:
                    self.statuses.append(http.post("/v1/completions", json=body).status_code)
                except httpx.TransportError:
                    self.statuses.append(NO_ANSWER)

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def check(source: Prometheus) -> dict[str, dict[str, Any]]:
    """For each panel, by "dashboard: title": series of each line, and whether it has data."""
    panels: dict[str, dict[str, Any]] = {}
    for line in lines():
        values = source.values(line.expression)
        panel = panels.setdefault(f"{line.dashboard}: {line.panel}", {"data": True, "series": {}})
        panel["series"][line.legend] = len(values)
        panel["data"] &= bool(values) and all(map(math.isfinite, values))
    return panels


def main(args: argparse.Namespace) -> dict[str, Any]:
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("panels.py runs the program prometheus, which is not on PATH")
    key = args.api_key_file.read_text().strip() if args.api_key_file else None
    address = args.url.removeprefix("http://")
    with (
        tempfile.TemporaryDirectory() as folder,
        prometheus(binary, Path(folder), address, key) as source,
        Traffic(args.url, args.model, args.tokens, key, args.clients) as traffic,
    ):
        time.sleep(args.seconds)
        panels = check(source)
        firing = sorted(source.firing())
    return {
        "prometheus": subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.splitlines()[0],
        "seconds": args.seconds,
        "requests": len(traffic.statuses),
        "requests_refused_or_failed": sum(status != 200 for status in traffic.statuses),
        "alerts_firing": firing,
        "panels": len(panels),
        "panels_with_data": sum(panel["data"] for panel in panels.values()),
        "each": panels,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo_model")
    parser.add_argument("--tokens", type=int, default=8192, help="the model's vocabulary")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write(machine() | main(options), options.out)
