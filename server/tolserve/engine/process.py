"""The engine process: a step loop around a ROUTER socket. engine/boot.py starts it.

Nothing of a request but its id ever enters a log line.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import torch
import zmq

from tolserve.engine.assemble import SettingsError, assemble, use_threads
from tolserve.engine.attribution import NoRoom, attribute
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine, Output
from tolserve.engine.inspect import look_up
from tolserve.engine.look import LOOK_TIMEOUT_SECONDS
from tolserve.engine.messages import (
    Abort,
    AskAttribution,
    AskCache,
    AskMetrics,
    AskPacks,
    AskToken,
    Attributed,
    Cache,
    Declined,
    FromEngine,
    Hello,
    Look,
    MetricsSnapshot,
    Packs,
    Progress,
    Ready,
    Refusal,
    Reopen,
    Reopened,
    Resize,
    Resized,
    Submit,
    ToEngine,
    TokenSeen,
    decode_to_engine,
    encode,
)
from tolserve.engine.pulse import Pulse
from tolserve.engine.request import Delta, Failure, Request, SamplingParams, Steering
from tolserve.model.checkpoint import CheckpointError
from tolserve.model.config import ConfigError
from tolserve.tol.pager import RecordsUnavailable
from tolserve.tol.table import RecordError, TableError

log = logging.getLogger(__name__)

Found = TypeVar("Found")


class EngineServer:
    """Moves messages between the socket and the engine, a step at a time."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], pulse: Pulse) -> None:
        self.engine, self.socket, self.pulse = engine, socket, pulse
        self._worker_of: dict[str, bytes] = {}  # request id -> the API worker that waits for it
        self._looks: deque[tuple[float, bytes, Look]] = deque()  # one between two steps

    def run(self, lifeline: int) -> None:
        """Serve until `lifeline`, the read end of a pipe that nothing is written to, is closed on its other end."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(lifeline, zmq.POLLIN)
        while lifeline not in (ready := dict(poller.poll(0 if self.engine.busy or self._looks else None))):
            self.pulse.step_begins()
            if ready:
                self._receive_all()
            if self._looks:
                since, worker, question = self._looks.popleft()
                self._send(worker, self._look(since, question))
            self._send_outputs(self.engine.step())
            self.pulse.step_ends()

    def _receive_all(self) -> None:
        while self.socket.poll(0):
            worker, frame = self.socket.recv_multipart()
            try:
                self._handle(worker, decode_to_engine(frame))
            except msgspec.MsgspecError:
                log.error("dropped a frame that is no message")

    def _handle(self, worker: bytes, message: ToEngine) -> None:
        match message:
            case Submit(request=request):
                if (failure := self.engine.add(request)) is not None:
                    self._send(worker, Refusal(failure))
                else:
                    self._worker_of[request.request_id] = worker
            case Abort(request_id=request_id):
                if self._worker_of.get(request_id) == worker:
                    self.engine.abort(request_id)
                    del self._worker_of[request_id]
            case Hello():
                self._send(worker, self._ready())
            case AskMetrics():
                self.engine.refresh_metrics()
                self._send(worker, MetricsSnapshot(self.engine.registry.snapshot()))
            case AskCache(limit=limit):
                pager = self.engine.pager
                self._send(worker, Cache(pager.view(limit) if pager is not None else None))
            case Resize(device_cache=device_cache, host_cache=host_cache):
                self._send(worker, self._resized(device_cache, host_cache))
            case Reopen():
                self._send(worker, self._reopened())
            case AskToken() | AskAttribution() | AskPacks():
                self._looks.append((time.monotonic(), worker, message))

    def _look(self, since: float, question: Look) -> TokenSeen | Attributed | Packs:
        engine = self.engine
        match question:
            case AskToken(token=token, layers=layers, top=top):
                engine.metrics.looks.add(1, "token")
                frequencies = engine.frequencies
                return TokenSeen(*_found(since, lambda: look_up(engine.runner, token, layers, top, frequencies())))
            case AskAttribution(request=request, targets=targets, against=against):
                engine.metrics.looks.add(1, "attribution")
                return Attributed(*_found(since, lambda: attribute(engine, request, targets, against)))
            case AskPacks():
                engine.metrics.looks.add(1, "packs")
                return Packs(*_found(since, engine.list_packs))

    def _resized(self, device_cache: str | None, host_cache: str | None) -> Resized:
        try:
            return Resized(self.engine.resize(device_cache, host_cache), None)
        except ValueError as error:
            return Resized(None, Declined("invalid", str(error)))
        except MemoryError as error:
            return Resized(None, Declined("memory", str(error)))

    def _reopened(self) -> Reopened:
        try:
            return Reopened(self.engine.reopen(), None)
        except (TableError, RecordError, OSError, ValueError) as error:
            log.warning("the table was not reopened: %s", error)
            path = str(self.engine.pager.table.path) if self.engine.pager is not None else ""
            return Reopened(None, Declined("conflict", str(error).replace(path, "the table")))
        except MemoryError as error:
            log.warning("the table was not reopened: %s", error)
            return Reopened(None, Declined("memory", "there is no memory for the new tiers beside the old ones"))

    def _ready(self) -> Ready:
        manifest = self.engine.pager.table.manifest if self.engine.pager is not None else None
        return Ready(
            vocab_size=self.engine.runner.model.config.vocab_size,
            num_layers=self.engine.runner.model.config.num_hidden_layers,
            max_model_len=self.engine.max_model_len,
            fingerprint=manifest.fingerprint if manifest else None,
            encoding=manifest.encoding.name if manifest else None,
        )

    def _send_outputs(self, outputs: list[Output]) -> None:
        """One message with a step's deltas for each worker, and one for each failure."""
        deltas: dict[bytes, list[Delta]] = {}
        for output in outputs:
            worker = self._worker_of[output.request_id]
            if isinstance(output, Failure) or output.finish_reason is not None:
                del self._worker_of[output.request_id]
            if isinstance(output, Delta):
                deltas.setdefault(worker, []).append(output)
                continue
            # The HTTP request's id comes before the slash, see api/state.py.
            about = {"request_id": output.request_id.partition("/")[0], "kind": output.kind}
            log.warning("a request failed: %s", output.message, extra=about)
            self._send(worker, Refusal(output))
        for worker, of_worker in deltas.items():
            self._send(worker, Progress(of_worker))

    def _send(self, worker: bytes, message: FromEngine) -> None:
        self.socket.send_multipart([worker, encode(message)])


def _found(since: float, find: Callable[[], Found]) -> tuple[Found | None, Declined | None]:
    """What a look finds, or why it finds nothing. Whoever asked too long ago has left and costs no work, but has an
    answer like the others: which is whose is known by their order."""
    try:
        if time.monotonic() - since > LOOK_TIMEOUT_SECONDS:
            raise NoRoom("the engine was busy for too long; try again later")
        return find(), None
    except NoRoom as error:
        return None, Declined("busy", str(error))
    except (RecordError, RecordsUnavailable) as error:
        return None, Declined("table", str(error))
    except ValueError as error:
        return None, Declined("invalid", str(error))
    except (MemoryError, torch.OutOfMemoryError):
        return None, Declined("memory", "there is no memory for this look beside what is served; ask for less of it")


def warm_up(engine: Engine) -> None:
    """Run tiny requests through prefill and decode, with a table also one that steers and a look: what is compiled,
    allocated or loaded at its first use is there when the first client comes. It shows in no counter and in no
    recording."""
    prompt = (0,) * min(2, engine.max_model_len)  # one token alone runs as those that decode do
    sampling = SamplingParams(max_tokens=min(2, engine.max_model_len - len(prompt)), temperature=0.0, ignore_eos=True)
    requests = [Request("warm-up", prompt, sampling)]
    if engine.pager is not None:
        alpha = (1.0,) * engine.runner.model.config.num_hidden_layers
        requests.append(Request("warm-up", prompt, sampling, steering=Steering(alpha)))
    recorder, engine.recorder = engine.recorder, None
    with engine.registry.uncounted():
        problems = [str(failed.message) for request in requests if (failed := _run_alone(engine, request)) is not None]
        if engine.pager is not None:
            try:
                look_up(engine.runner, 0, None, 1)
            except RecordError as error:
                problems.append(str(error))
    engine.recorder = recorder
    if problems:  # a record that cannot be read, say: others can
        log.warning("the warm-up failed: %s", problems[0])


def _run_alone(engine: Engine, request: Request) -> Failure | None:
    failed = engine.add(request)
    while engine.busy:
        failed = next((output for output in engine.step() if isinstance(output, Failure)), failed)
    return failed


def run(raw: dict[str, Any], pulse: Pulse) -> int:
    """Bind, load, serve until standard input closes. Returns an exit status: 2 for a model, a table or options that
    cannot be served, which the log names."""
    address = raw.pop("address")
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    # Nothing is dropped towards a worker that reads slowly: a lost delta would be a silently wrong answer.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    try:
        settings = EngineSettings.from_json(raw)
        use_threads(settings.threads)
        engine = assemble(settings)
    except (ConfigError, CheckpointError, TableError, RecordError, SettingsError, ValueError, MemoryError) as error:
        log.error("%s", error)
        return 2
    try:
        warm_up(engine)
        EngineServer(engine, socket, pulse).run(sys.stdin.fileno())
        engine.finish()
    finally:
        engine.close()
        context.destroy(linger=0)
    return 0
