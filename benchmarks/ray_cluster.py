"""Ray Serve on this machine alone, for the test and the benchmark of deploy/ray.

Ray listens on every interface and starts many processes. So it gets a network namespace with nothing but the loopback
device, and a process namespace that ends as a whole. Both need root.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "deploy" / "ray" / "serve.yaml"
START_SECONDS = 180.0  # 10 s on a quiet machine
_CLONE_NEWNET = 0x40000000
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",  # else it depends on a token in this user's home; nobody else sees this network
    # Ray replaces a proxy that is late, and shared machines stall for seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
# The shell is the namespace's first process: it takes the ended processes that nobody waits for off the list.
_START = """
ray start --head --node-ip-address=127.0.0.1 --temp-dir="$0" --num-cpus=8 --object-store-memory=80000000 \\
    --include-dashboard=false --include-log-monitor=false --disable-usage-stats
serve run --address=127.0.0.1:6379 "$1"
"""


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Inside, this thread and what it starts see a loopback device of their own and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(failed: int) -> None:
        if failed:
            raise OSError(ctypes.get_errno(), "no network namespace; this needs root")

    with open("/proc/thread-self/ns/net") as outside:
        check(libc.unshare(_CLONE_NEWNET))
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            check(libc.setns(outside.fileno(), _CLONE_NEWNET))


def shipped_config() -> dict[str, Any]:
    """deploy/ray/serve.yaml."""
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    return config


@dataclass
class Cluster:
    """A running Ray with its applications."""

    process: subprocess.Popen[bytes]
    url: str
    headers: dict[str, str]
    log: Path

    def client(self, path: str = "") -> httpx.Client:
        return httpx.Client(base_url=self.url + path, headers=self.headers, timeout=60)

    def by_replica(self, name: str, path: str = "") -> dict[str, float]:
        """A metric of each replica under this route prefix, summed over its other labels; empty where /metrics does
        not answer."""
        with self.client(path) as client:
            answer = client.get("/metrics")
        values: defaultdict[str, float] = defaultdict(float)
        if answer.status_code == 200:
            for family in text_string_to_metric_families(answer.text):
                for sample in family.samples:
                    if sample.name == name:
                        values[sample.labels["replica"]] += sample.value
        return dict(values)

    def wait_for(self, replicas: int, path: str = "", but: frozenset[str] = frozenset()) -> set[str]:
        """The ids of this many replicas with a live engine, none of them in `but`. RuntimeError if they never come."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                up = {replica for replica, value in self.by_replica("tolserve_engine_up", path).items() if value == 1}
                if len(up - but) == len(up) == replicas:
                    return up
            time.sleep(0.2)
        raise RuntimeError(f"there are no {replicas} replicas:\n{self.log.read_text()[-4000:]}")


def replicas_here(application: str = "tolserve") -> dict[int, int]:
    """Process id of each replica in this thread's network namespace, and of its engine."""
    here = os.readlink("/proc/thread-self/ns/net")
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cmdline").read_text().startswith(f"ray::ServeReplica:{application}:"):
                pid = int(folder.name)
                if os.readlink(folder / "ns/net") == here:
                    (found[pid],) = _children(pid)
    return found


def _children(pid: int) -> list[int]:
    texts = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for text in texts for child in text.split()]


@contextlib.contextmanager
def ray_serve(config: dict[str, Any], headers: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Run the applications of `config` until the end of the block. Call it inside `own_network`."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("deploy/ray", "server", "kernels"))
    commands = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PYTHONPATH": paths, "PATH": commands} | _ENVIRONMENT
    # A short path: the names of Ray's sockets must stay below 108 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "serve.yaml").write_text(json.dumps(config))
        argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", _START]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*argv, str(folder / "ray"), str(folder / "serve.yaml")],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Cluster(process, f"http://127.0.0.1:{config['http_options']['port']}", headers or {}, folder / "log")
        finally:
            # unshare ends when the first process of the namespace has, and with it all others.
            for child in _children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.wait(30)
