"""A real server whose table lies on a disk that misbehaves: what clients get, and what the server says of itself."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import CONTEXT, Running, environment, tolserve
from faulty_fs import Fault, Injected, Mount
from tiny import tiny_config
from tol.tables import shard_file
from tolserve.model.build import build_table
from tolserve.model.config import ModelConfig
from tolserve.tol.table import Table

WARM_UP = 0  # the warm-up's first token
BAD = 250  # in no prompt but the victims', and (asserted) in no answer
VICTIM = [3, BAD, 5]
OTHERS = [[10 * i + j for j in range(6)] for i in range(1, 5)]
FAULTS = {"io": Fault("read", "error"), "short": Fault("read", "short"), "checksum": Fault("read", "corrupt")}


@dataclass
class Site:
    """A server whose device tier holds a twelfth of the table, and the table seen through the faulty file system."""

    server: Running
    mount: Mount
    folder: Path  # the table's, behind the file system
    table: Table
    right: dict[tuple[int, ...], list[str]] = field(default_factory=dict)  # each prompt's answer without faults

    def inject(self, fault: Fault, token: int = BAD) -> Injected:
        file, first = shard_file(self.table, token)
        return self.mount.inject(
            replace(fault, file=file.name, first=first, last=first + self.table.manifest.record_bytes)
        )

    def ask(self, prompt: list[int], **changes: Any) -> tuple[int, dict[str, Any]]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 1}
        with self.server.http() as client:
            answer = client.post("/v1/completions", json=body | changes)
        return answer.status_code, answer.json()

    def tokens(self, prompt: list[int], max_tokens: int = 6) -> list[str]:
        status, body = self.ask(prompt, max_tokens=max_tokens)
        assert status == 200, body
        tokens: list[str] = body["choices"][0]["logprobs"]["tokens"]
        return tokens

    def served(self, *prompts: list[int], max_tokens: int = 6) -> None:
        """All at the same time; each is answered as it is without faults."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = pool.map(lambda prompt: self.tokens(prompt, max_tokens), prompts)
            for prompt, tokens in zip(prompts, answers, strict=True):
                assert tokens == self.right[tuple(prompt)][:max_tokens]

    def forget(self) -> None:
        """Push everything else out of the device tier."""
        self.ask(list(range(100, 130)), max_tokens=1)

    def errors(self, kind: str) -> float:
        return self.server.metric(f'tolserve_tol_read_errors_total{{kind="{kind}"}}')


def fails_for_the_table(answer: tuple[int, dict[str, Any]]) -> str:
    status, body = answer
    assert status == 500, body
    assert body["error"]["code"] == body["error"]["type"] == "table_error"
    assert f"record of token {BAD}: " in body["error"]["message"]
    return str(body["error"]["message"])


@pytest.fixture(scope="module")
def paged_model(model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    """A model whose records are pages, so that each is a read of its own."""
    return model_dir_of(tiny_config(hidden_size=256, num_hidden_layers=8, max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def whole_table(paged_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "tol"
    build_table(paged_model, folder)
    return folder


@pytest.fixture(scope="module")
def _site(start_server: Callable[..., Running], _mount: Mount, paged_model: Path, whole_table: Path) -> Iterator[Site]:
    """Started while the record that its warm-up needs cannot be read."""
    seen = _mount.at(whole_table)
    options = ["--table", str(seen), "--device-cache", "24", "--max-num-seqs", "8"]
    options += ["--no-prefix-cache"]  # a prompt that came before would need no record
    running = start_server(*options, model=paged_model)
    site = Site(running, _mount, whole_table, Table.open(seen))
    fault = site.inject(FAULTS["io"], WARM_UP)
    running.wait_ready()
    assert fault.fired >= 2
    _mount.clear()
    assert f"the warm-up failed: record of token {WARM_UP}: " in running.log.read_text()
    for prompt in ([WARM_UP], VICTIM, *OTHERS):
        site.right[tuple(prompt)] = site.tokens(prompt)
    yield site
    assert running.metric("tolserve_engine_restarts_total") == 0
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def site(_site: Site, mount: Mount) -> Site:
    _site.forget()
    return _site


def test_a_server_starts_though_its_warm_up_cannot_be_read(site: Site) -> None:
    site.served([WARM_UP])


@pytest.mark.parametrize("kind", FAULTS)
def test_what_passes_is_nothing_that_a_client_sees(site: Site, kind: str) -> None:
    before = site.errors(kind)
    fault = site.inject(replace(FAULTS[kind], times=1))
    site.served(VICTIM, *OTHERS)
    assert fault.fired == 1
    assert site.errors(kind) == before + 1


@pytest.mark.parametrize("kind", FAULTS)
def test_what_stays_fails_those_who_need_the_record_and_no_others(site: Site, kind: str) -> None:
    before = site.errors(kind)
    fault = site.inject(FAULTS[kind])
    with ThreadPoolExecutor(3) as pool:
        victims = [pool.submit(site.ask, prompt) for prompt in (VICTIM, [*OTHERS[0], BAD], [BAD])]
        site.served(*OTHERS)
        for victim in victims:
            fails_for_the_table(victim.result())
    assert fault.fired >= 2
    assert site.errors(kind) == before + fault.fired
    site.mount.clear()
    site.served(VICTIM)


def test_a_stream_ends_with_the_error(site: Site) -> None:
    fault = site.inject(FAULTS["io"])
    body = {"model": "tiny", "prompt": VICTIM, "stream": True}
    with site.server.http() as client:
        answer = client.post("/v1/completions", json=body)
    # Nothing was sent before the error, so it is a status and no event.
    assert "table_error" in answer.text
    assert f"record of token {BAD}: " in answer.text
    assert fault.fired >= 2


@contextmanager
def watching(site: Site) -> Iterator[list[int]]:
    """Statuses of /health meanwhile, asked ten times a second."""
    statuses: list[int] = []
    over = threading.Event()

    def look() -> None:
        with site.server.http() as client:
            while not over.wait(0.1):
                statuses.append(client.get("/health").status_code)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield statuses
    finally:
        over.set()
        thread.join()


def test_a_read_of_seconds_makes_its_request_slow_and_nobody_wrong(site: Site) -> None:
    """Longer than the silence after which an engine counts as hung: it still beats."""
    seconds = 4.5
    stalled = site.server.metric("tolserve_tol_stall_seconds_total")
    fault = site.inject(Fault("read", "delay", times=1, seconds=seconds))
    began = time.monotonic()
    with watching(site) as statuses:
        site.served(VICTIM, *OTHERS)
    assert time.monotonic() - began > seconds - 0.5
    assert fault.fired == 1
    assert set(statuses) == {200}
    assert len(statuses) > 10
    assert site.server.metric("tolserve_tol_stall_seconds_total") > stalled + seconds - 1.0


def test_a_shard_that_is_removed_under_the_server_is_read_on(site: Site) -> None:
    hidden = site.folder / "elsewhere"
    shard = site.folder / site.table.manifest.shards[0].file
    os.link(shard, hidden)
    (site.table.path / shard.name).unlink()
    try:
        site.served(VICTIM, *OTHERS)
    finally:
        os.rename(hidden, shard)


def test_a_shard_that_is_cut_off_under_the_server_fails_what_lies_beyond(site: Site) -> None:
    path, offset = shard_file(site.table, BAD)
    behind = site.folder / path.name
    whole = behind.read_bytes()
    before = site.errors("short")
    os.truncate(behind, offset)
    try:
        fails_for_the_table(site.ask(VICTIM))
        site.served(*OTHERS, max_tokens=1)  # what comes back in would have to be read
        assert site.errors("short") >= before + 2
    finally:
        with behind.open("r+b") as file:
            file.write(whole)
    site.served(VICTIM)


# Starting ------------------------------------------------------------------------------------------------------------


def test_a_start_that_meets_a_fault_ends_with_a_line_that_names_it(
    mount: Mount, paged_model: Path, whole_table: Path, tmp_path: Path
) -> None:
    """An I/O error where the reader opens the shard, after the header was read; one in the weights, which are mapped,
    so that it is a signal; and one in a record that must be there, since all of the table is to lie in host memory."""
    copy = shutil.copytree(whole_table, tmp_path / "copy")
    file, offset = shard_file(Table.open(copy), BAD)
    faults = [
        mount.inject(Fault("open", "error", f"{whole_table.name}/{file.name}", after=1)),
        mount.inject(Fault("read", "error", "model.safetensors", first=1 << 16)),
        mount.inject(Fault("read", "error", f"copy/{file.name}", offset, offset + 1)),
    ]
    expected = {
        (paged_model, mount.at(whole_table)): f"{file.name} cannot be read: [Errno 5] Input/output error",
        (mount.at(paged_model), whole_table): "killed by SIGBUS; a mapped file could not be read",
        (paged_model, mount.at(copy), "--host-cache", "100%"): f"record of token {BAD}: [Errno 5] Input/output error",
    }
    started = []
    for model, table, *options in expected:
        argv = tolserve("serve", str(model), "--table", str(table), "--port", "0", "--log-format", "text", *options)
        started.append(subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True))
    for process, message in zip(started, expected.values(), strict=True):
        said = process.communicate(timeout=110)[1]
        assert process.returncode == 1
        assert message in said
        assert "Traceback" not in said
    assert all(fault.fired for fault in faults)
