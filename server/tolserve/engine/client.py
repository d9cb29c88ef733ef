"""The API's side of the engine: starts the process, sends requests, hands out each request's answers."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator
from itertools import count
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

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
    decode_from_engine,
    encode,
)
from tolserve.engine.request import Delta, Failure, Request
from tolserve.metrics import Metric
from tolserve.tol.view import DeviceView

# A scrape waits this long for fresh numbers; a step of a large prefill can take longer, then the last ones are shown.
METRICS_TIMEOUT_SECONDS = 1.0
# Somebody looking into the cache waits as long as a long step may take, then is told to try again.
CACHE_TIMEOUT_SECONDS = 10.0


class EngineError(RuntimeError):
    """A request that the engine could not serve; `kind` as in request.Failure."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class EngineClient:
    """One API worker's connection. `start` runs the engine as a child process and returns at once; `ready` is None
    until the engine has said that it can serve."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings` is the JSON form of engine.config.EngineSettings."""
        self._settings = settings
        self.ready: Ready | None = None
        self.failure: str | None = None
        self._answers: dict[str, asyncio.Queue[Delta | Failure]] = {}
        self._asked: dict[int, asyncio.Future[DeviceView | None]] = {}  # looks into the cache that wait for an answer
        self._numbers = count()
        self._metrics: list[Metric] = []
        self._fresh_metrics = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def alive(self) -> bool:
        return self.failure is None

    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tolserve-")  # mode 0700: only this user can connect
        address = f"ipc://{Path(self._folder.name) / 'engine.sock'}"
        # The engine watches its standard input: when this process dies, the pipe closes and it stops too.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tolserve.engine.process"], stdin=subprocess.PIPE, text=True
        )
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps({"address": address} | self._settings) + "\n")
            self._process.stdin.flush()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Close the pipe that keeps the engine alive and wait for it to end."""
        for task in self._tasks:
            task.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.to_thread(self._process.wait, 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    async def _send(self, message: ToEngine) -> None:
        await self._socket.send(encode(message))

    async def _receive(self) -> None:
        await self._send(Hello())
        while True:
            self._dispatch(decode_from_engine(await self._socket.recv()))

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self.ready = message
            case MetricsSnapshot(metrics=metrics):
                self._metrics = metrics
                self._fresh_metrics.set()
            case Cache(number=number, view=view):
                if (asked := self._asked.get(number)) is not None and not asked.done():
                    asked.set_result(view)
            case Progress(delta=answer) | Refusal(failure=answer):
                if (queue := self._answers.get(answer.request_id)) is not None:
                    queue.put_nowait(answer)

    async def _watch(self) -> None:
        """Notice the engine's death and fail everyone who waits for it."""
        while (code := self._process.poll()) is None:
            await asyncio.sleep(0.1)
        self.ready = None
        self.failure = f"the engine process ended with exit code {code}"
        for request_id, queue in self._answers.items():
            queue.put_nowait(Failure(request_id, "dead", self.failure))
        self._fresh_metrics.set()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Submit a request and yield its deltas, the last one with `finish_reason` and `usage`.

        Raises EngineError when the engine refuses, fails or dies. Closing the iterator early aborts the request.
        """
        if self.failure is not None:
            raise EngineError("dead", self.failure)
        queue: asyncio.Queue[Delta | Failure] = asyncio.Queue()
        self._answers[request.request_id] = queue
        finished = False
        try:
            await self._send(Submit(request))
            while not finished:
                answer = await queue.get()
                if isinstance(answer, Failure):
                    finished = True
                    raise EngineError(answer.kind, answer.message)
                finished = answer.finish_reason is not None
                yield answer
        finally:
            del self._answers[request.request_id]
            if not finished and self.failure is None:
                self._socket.send(encode(Abort(request.request_id)))

    async def cache(self, limit: int) -> DeviceView | None:
        """What the device tier holds, at most `limit` records of it; None for a model without a table.

        Raises EngineError when the engine is gone or too busy to answer.
        """
        if self.failure is not None:
            raise EngineError("dead", self.failure)
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(AskCache(number, limit))
            return await asyncio.wait_for(answer, CACHE_TIMEOUT_SECONDS)
        except TimeoutError:
            raise EngineError("dead", "the engine did not answer in time; try again") from None
        finally:
            del self._asked[number]

    async def metrics(self) -> list[Metric]:
        """The engine's numbers: fresh if it answers in time, else the last it sent."""
        if self.failure is None:
            self._fresh_metrics.clear()
            await self._send(AskMetrics())
            try:
                await asyncio.wait_for(self._fresh_metrics.wait(), METRICS_TIMEOUT_SECONDS)
            except TimeoutError:
                pass
        return self._metrics
