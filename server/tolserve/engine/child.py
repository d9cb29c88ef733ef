"""One incarnation of the engine process, seen from the API: the process, its sockets, what it said, how it ended."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import zmq
import zmq.asyncio

from tolserve.engine.messages import (
    AskMetrics,
    FromEngine,
    Heartbeat,
    Hello,
    MetricsSnapshot,
    Progress,
    Ready,
    Refusal,
    ToEngine,
    decode_from_engine,
    encode,
)
from tolserve.engine.request import Delta, Failure, FailureKind
from tolserve.metrics import Metric

# How often the process is looked at.
TICK_SECONDS = 0.1
# A ready engine beats every 0.5 s. Eight missed beats are no hiccup, and health turns within 5 s of a SIGSTOP.
SILENCE_SECONDS = 4.0
# Loading torch from a cold disk, or compiling kernels, may hold the interpreter's lock for many seconds.
LOADING_SILENCE_SECONDS = 60.0
# The longest honest step of 512 tokens: through the 1B shape they take tens of seconds on two slow cores, and 512
# records from a disk that gives 10 MB/s another five. A step that is older has stopped. Larger ones get more in
# proportion.
STEP_SECONDS = 120.0
# Lateness of a tick that means a machine that stood still. What is less is a busy loop, and the four seconds cover it.
STANDSTILL_SECONDS = 1.0
# Numbers since the last snapshot are lost with an engine that dies; one snapshot costs it about 0.1 ms.
SNAPSHOT_SECONDS = 1.0
# An engine that was told to stop finishes its step and saves what it recorded: of a trace at most 32 MiB, which any
# disk takes in a second. What is not saved by then is there as of the last flush.
STOP_SECONDS = 4.0
# A killed process is gone in milliseconds, unless the kernel itself waits for a disk.
KILL_SECONDS = 10.0
# What a signal that nobody here sent usually means, for the log.
ADVICE: dict[int, str] = {
    signal.SIGKILL: "unless somebody killed it, the machine or the container is out of memory (then the kernel's log "
    "says so): give less to --device-cache, --host-cache and --kv-cache, or allow the server more",
    signal.SIGBUS: "a mapped file could not be read: is the disk with the model's weights in order?",
}

Answer = TypeVar("Answer", bound=FromEngine)


@dataclass(frozen=True)
class End:
    """How an incarnation ended: by itself, or killed because it hung."""

    reason: Literal["exit", "hang"]
    message: str
    advice: str = ""  # for who runs the server


class Child:
    """Starts the engine process; whoever made it awaits `watch` and then `close`, or `stop`."""

    def __init__(
        self, context: zmq.asyncio.Context, settings: dict[str, Any], on_ready: Callable[[Ready], None]
    ) -> None:
        """To be called in a running event loop, on a thread that lives as long as the process: the engine ends with
        it. `settings` is the JSON form of engine.config.EngineSettings. Raises OSError when no process can be started.
        """
        self._on_ready = on_ready
        self.ready_since: float | None = None  # monotonic
        self.metrics: list[Metric] = []
        self.answers: dict[str, asyncio.Queue[Delta | Failure]] = {}
        self._asked: defaultdict[type, deque[asyncio.Future[Any]]] = defaultdict(deque)
        self._heard, self._step_seconds = time.monotonic(), 0.0
        self._beating = False
        self._step_limit = STEP_SECONDS * max(1.0, settings["max_num_batched_tokens"] / 512)
        self._held = ExitStack()  # what `close` gives back
        try:
            self._start(context, settings)
        except (OSError, zmq.ZMQError) as error:
            self._held.close()
            raise OSError(error.errno, f"no engine process can be started: {error}") from error
        self._tasks = [asyncio.create_task(work()) for work in (self._receive, self._listen, self._collect)]

    def _start(self, context: zmq.asyncio.Context, settings: dict[str, Any]) -> None:
        # Mode 0700: only this user can connect. A folder that cannot be deleted is no reason to lose an engine.
        self._folder = tempfile.TemporaryDirectory(prefix="tolserve-", ignore_cleanup_errors=True)
        self._held.callback(self._folder.cleanup)
        address, pulse = (f"ipc://{Path(self._folder.name) / name}.sock" for name in ("engine", "pulse"))
        self._socket, self._pulse = self._open(context, zmq.DEALER), self._open(context, zmq.PULL)
        self._pulse.bind(pulse)
        self._socket.connect(address)
        argv = [sys.executable, "-m", "tolserve.engine.boot"]
        # Unbuffered: what a dead process did not take must not come up again when the pipe is closed.
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, bufsize=0)
        self._tell({"address": address, "pulse": pulse, "parent": os.getpid()} | settings)

    def _open(self, context: zmq.asyncio.Context, kind: int) -> zmq.asyncio.Socket:
        socket = context.socket(kind)
        self._held.callback(socket.close)
        socket.setsockopt(zmq.LINGER, 0)
        # Nothing is dropped towards an engine in a long step, nor from one while this process is slow.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        return socket

    def _tell(self, settings: dict[str, Any]) -> None:
        """Write the settings' line. The pipe stays open: when this process dies it closes, and the engine stops."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.write(json.dumps(settings).encode() + b"\n")
            except BrokenPipeError:
                pass  # it ended at once; `watch` says so

    @property
    def ready_for(self) -> float:
        """Seconds since it became ready, 0 before."""
        return 0.0 if self.ready_since is None else time.monotonic() - self.ready_since

    async def send(self, message: ToEngine) -> None:
        await self._socket.send(encode(message))

    def post(self, message: ToEngine) -> None:
        """`send` for those who cannot wait."""
        self._socket.send(encode(message))

    async def ask(self, question: ToEngine, kind: type[Answer], seconds: float | None) -> Answer | None:
        """The engine's answer to a question, a message of type `kind`; None if it takes longer than `seconds`."""
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._asked[kind].append(answer)  # answers of one kind come in the order of their questions
        await self.send(question)
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            return None

    async def _receive(self) -> None:
        await self.send(Hello())
        while True:
            self._dispatch(decode_from_engine(await self._socket.recv()))

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Progress(deltas=deltas):
                for delta in deltas:
                    self._answer(delta)
                return
            case Refusal(failure=failure):
                self._answer(failure)
                return
            case Ready():
                self.ready_since = self._heard = time.monotonic()
                self._forget_names()
                self._on_ready(message)
            case MetricsSnapshot(metrics=metrics):
                self.metrics = metrics
        waiting = self._asked[type(message)]
        if waiting and not (first := waiting.popleft()).done():
            first.set_result(message)

    def _answer(self, answer: Delta | Failure) -> None:
        if (queue := self.answers.get(answer.request_id)) is not None:
            queue.put_nowait(answer)

    async def _listen(self) -> None:
        while True:
            match decode_from_engine(await self._pulse.recv()):
                case Heartbeat(step_seconds=seconds):
                    self._heard, self._step_seconds = time.monotonic(), seconds
            if not self._beating:
                self._beating = True
                self._forget_names()

    def _forget_names(self) -> None:
        """Once both connections stand their names can go: a server that is killed leaves no file behind, unless that
        happens while the model loads."""
        if self._beating and self.ready_since is not None:
            self._folder.cleanup()

    async def _collect(self) -> None:
        """Keep a recent snapshot of the engine's numbers: they outlive it."""
        while True:
            await self.ask(AskMetrics(), MetricsSnapshot, None)
            await asyncio.sleep(SNAPSHOT_SECONDS)

    async def watch(self) -> End:
        """Wait until the engine ends or hangs."""
        while True:
            looked = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            late = time.monotonic() - looked - TICK_SECONDS
            if late > STANDSTILL_SECONDS:
                self._heard += late  # this process did not run; perhaps the engine could not either
            if (end := self._end()) is not None:
                return end

    def _end(self) -> End | None:
        if (status := self.process.poll()) is not None:
            return End("exit", f"the engine process ended: {_describe(status)}", ADVICE.get(-status, ""))
        if (failed := next((task for task in self._tasks if task.done()), None)) is not None:
            return End("hang", f"reading from the engine failed: {failed.exception()!r}")
        limit = LOADING_SILENCE_SECONDS if self.ready_since is None else SILENCE_SECONDS
        if time.monotonic() - self._heard > limit:
            return End("hang", f"the engine process hung: no sign of life for {limit:g} s")
        if self.ready_since is not None and self._step_seconds > self._step_limit:
            return End("hang", f"the engine process hung: one step took more than {self._step_limit:g} s")
        return None

    def fail(self, kind: FailureKind, message: str) -> int:
        """Fail every request that waits for an answer, and every question. Returns the number of requests."""
        for request_id, queue in self.answers.items():
            queue.put_nowait(Failure(request_id, kind, message))
        for waiting in self._asked.values():
            for answer in waiting:
                if not answer.done():
                    answer.set_result(None)
        return len(self.answers)

    def kill(self) -> None:
        """End the process at once, stopped or not. Its folder goes too: this may be the caller's last act."""
        self.process.kill()
        self._folder.cleanup()

    async def stop(self) -> None:
        """Let the engine finish its step and end, then `close`."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self._ended(STOP_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Kill the process if it still runs, wait for it, and let go of everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        await self._ended(KILL_SECONDS)
        self._held.close()

    async def _ended(self, seconds: float) -> None:
        """Wait for the process's end, at most so long; this also takes it off the system's list."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
