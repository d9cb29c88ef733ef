"""The engine process: a step loop around a ROUTER socket. Run as `python -m tolserve.engine.process`.

Its settings arrive as one JSON line on standard input, which then stays open: when the parent is gone the pipe closes
and the engine ends. Nothing of a request but its id ever enters a log line.
"""

import json
import logging
import os
import signal
import sys
import threading
from typing import Any

import msgspec
import zmq

from tolserve.engine.assemble import SettingsError, assemble, use_threads
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine
from tolserve.engine.messages import (
    Abort,
    AskCache,
    AskMetrics,
    Cache,
    FromEngine,
    Hello,
    MetricsSnapshot,
    Progress,
    Ready,
    Refusal,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
)
from tolserve.engine.request import Delta, Failure
from tolserve.model.checkpoint import CheckpointError
from tolserve.model.config import ConfigError
from tolserve.tol.table import TableError

log = logging.getLogger(__name__)

IDLE_POLL_MS = 1000  # an idle engine sleeps in poll; the limit only bounds how long a stopping one takes


class EngineServer:
    """Moves messages between the socket and the engine, a step at a time."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self.engine, self.socket = engine, socket
        self._worker_of: dict[str, bytes] = {}  # request id -> the API worker that waits for it

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            if not self.engine.busy:
                self.socket.poll(IDLE_POLL_MS)
            self._receive_all()
            for output in self.engine.step():
                self._send_output(output)

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
            case AskCache(number=number, limit=limit):
                pager = self.engine.pager
                self._send(worker, Cache(number, pager.view(limit) if pager is not None else None))

    def _ready(self) -> Ready:
        manifest = self.engine.pager.table.manifest if self.engine.pager is not None else None
        return Ready(
            vocab_size=self.engine.runner.model.config.vocab_size,
            max_model_len=self.engine.max_model_len,
            fingerprint=manifest.fingerprint if manifest else None,
            encoding=manifest.encoding_name if manifest else None,
        )

    def _send_output(self, output: Delta | Failure) -> None:
        worker = self._worker_of[output.request_id]
        if isinstance(output, Failure) or output.finish_reason is not None:
            del self._worker_of[output.request_id]
        self._send(worker, Refusal(output) if isinstance(output, Failure) else Progress(output))

    def _send(self, worker: bytes, message: FromEngine) -> None:
        self.socket.send_multipart([worker, encode(message)])


def _stop_when_parent_is_gone(stopping: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stopping.set()


def serve(raw: dict[str, Any]) -> None:
    """Bind, load, serve until standard input closes."""
    address = raw.pop("address")
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    # Nothing is dropped towards a worker that reads slowly: a lost delta would be a silently wrong answer.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    use_threads()
    engine = assemble(EngineSettings.from_json(raw))
    stopping = threading.Event()
    threading.Thread(target=_stop_when_parent_is_gone, args=(stopping,), daemon=True).start()
    try:
        EngineServer(engine, socket).run(stopping)
    finally:
        engine.close()
        context.destroy(linger=0)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal signals the whole group; the parent decides
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine: %(message)s", stream=sys.stderr)
    try:
        serve(json.loads(sys.stdin.readline()))
    except (ConfigError, CheckpointError, TableError, SettingsError, ValueError) as error:
        print(f"tolserve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
