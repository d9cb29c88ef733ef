"""The API's side of the engine: keeps an engine process running, sends it requests, hands out each one's answers."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import zmq.asyncio

from tolserve.engine.child import Answer, Child, End
from tolserve.engine.look import LOOK_TIMEOUT_SECONDS, Attribution, TokenView
from tolserve.engine.messages import (
    Abort,
    AskAttribution,
    AskCache,
    AskMetrics,
    AskPacks,
    AskToken,
    Attributed,
    Cache,
    MetricsSnapshot,
    Packs,
    Ready,
    Reopen,
    Reopened,
    Resize,
    Resized,
    Submit,
    ToEngine,
    TokenSeen,
)
from tolserve.engine.request import Delta, Failure, PackView, Request
from tolserve.metrics import Metric, Metrics, merge
from tolserve.tol.view import CacheSizes, DeviceView

log = logging.getLogger(__name__)

Granted = TypeVar("Granted")

# A scrape waits this long for fresh numbers; a step of a large prefill can take longer, then the last ones are shown.
METRICS_TIMEOUT_SECONDS = 1.0
# Before a restart: soon after the first death, which may be chance, seldom when an engine cannot stay up.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
# An engine that served for so long ends the streak of failures.
STEADY_SECONDS = 60.0


class EngineError(RuntimeError):
    """What the engine could not serve; `kind` as in request.Failure or messages.Declined, or "slow" for a question that
    timed out. `param` names the request's field at fault, where it is one."""

    def __init__(self, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.param = kind, param


class EngineClient:
    """One API worker's connection. `start` runs the engine as a child process and returns at once. An engine that ends
    or hangs is replaced, again and again; only one that was never ready is not.

    `ready` is None unless the engine answers. `failure` says why no engine answers any more, until one does again.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings` is the JSON form of engine.config.EngineSettings."""
        self._settings = settings
        self.ready: Ready | None = None
        self.failure: str | None = None
        self._child: Child | None = None  # the latest incarnation
        self._past: list[Metric] = []  # what earlier incarnations counted
        self._own = Metrics()
        self._up = self._own.gauge("engine_up", "1 while the engine answers, else 0.")
        self._restarts = self._own.counter(
            "engine_restarts_total", "Engines that ended and were replaced.", ("reason",), [("exit",), ("hang",)]
        )
        # The engine counts its own kinds of failure under the same name.
        self._failed = self._own.counter(
            "request_failure_total", "Requests failed", ("kind",), [("dead",), ("stopping",)]
        )

    @property
    def alive(self) -> bool:
        """False from an engine's end until the next one is ready."""
        return self.failure is None

    def start(self) -> None:
        """To be called in a running event loop, on a thread that lives as long as the process. Raises OSError when no
        process can be started."""
        self._context = zmq.asyncio.Context()
        self._child = Child(self._context, self._settings, self._became_ready)
        self._supervisor = asyncio.create_task(self._supervise(self._child))
        self._supervisor.add_done_callback(self._unsupervised)

    def _became_ready(self, ready: Ready) -> None:
        if self.failure is not None:
            log.info("the engine is ready again")
        self.ready, self.failure = ready, None

    async def _supervise(self, child: Child) -> None:
        pause = FIRST_PAUSE_SECONDS
        ever_ready = False
        while True:
            end = await child.watch()
            ever_ready |= child.ready_since is not None
            self._fell(child, end, ever_ready)
            await child.close()
            if not ever_ready:
                return
            if child.ready_for >= STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            child, pause = await self._replace(pause)

    def _unsupervised(self, supervisor: asyncio.Task[None]) -> None:
        """A fault in here must not look like an engine that is about to come back."""
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            self.ready, self.failure = None, "the engine is not supervised any more; restart the server"
            log.critical("%s", self.failure, exc_info=error)

    def _fell(self, child: Child, end: End, restart: bool) -> None:
        """Tell everyone who waits, and keep what the incarnation counted."""
        self.ready = None
        self.failure = end.message + ("; it is being restarted" if restart else "")
        log.error("%s", "; ".join(filter(None, (self.failure, end.advice))))
        self._failed.add(child.fail("dead", self.failure), "dead")
        self._past = merge(self._past, child.metrics)
        if restart:
            self._restarts.add(1, end.reason)

    async def _replace(self, pause: float) -> tuple[Child, float]:
        """The next incarnation, and how long to wait before the one after it."""
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            try:
                # The table may have been exchanged for one of another encoding, even while the engine went down.
                settings = self._settings | {"any_encoding": True}
                self._child = Child(self._context, settings, self._became_ready)
            except OSError as error:
                log.error("%s", error)
            else:
                return self._child, pause

    async def stop(self) -> None:
        """End the engine, after the step that it is in, and the supervision."""
        if self._child is None:
            return
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._child.stop()
        self._context.destroy(linger=0)

    def kill(self) -> None:
        """End the engine at once, for a process that is about to end itself."""
        if self._child is not None:
            self._child.kill()

    def give_up(self, message: str) -> None:
        """Fail every request that still runs, because the server stops."""
        if self._child is not None:
            self._failed.add(self._child.fail("stopping", message), "stopping")

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Submit a request and yield its deltas, the last one with `finish_reason` and `usage`.

        Raises EngineError when the engine refuses, fails or dies. Closing the iterator early aborts the request.
        """
        child = self._answering()
        queue: asyncio.Queue[Delta | Failure] = asyncio.Queue()
        child.answers[request.request_id] = queue
        finished = False
        try:
            await child.send(Submit(request))
            while not finished:
                answer = await queue.get()
                if isinstance(answer, Failure):
                    finished = True
                    raise EngineError(answer.kind, answer.message, answer.param)
                finished = answer.finish_reason is not None
                yield answer
        finally:
            del child.answers[request.request_id]
            if not finished and child is self._child and self.failure is None:
                child.post(Abort(request.request_id))

    def _answering(self) -> Child:
        """Raises EngineError while no engine answers. One that loads for the first time counts: it will."""
        if self._child is None or self.failure is not None:
            raise EngineError("dead", self.failure or "the engine was not started")
        return self._child

    async def cache(self, limit: int) -> DeviceView | None:
        """What the device tier holds, at most `limit` records of it; None for a model without a table.

        Raises EngineError when the engine is gone or too busy to answer.
        """
        return (await self._ask(AskCache(limit), Cache)).view

    async def packs(self) -> list[PackView]:
        """The memory packs that requests may ask for, by name. Raises EngineError, also on a server that has no folder
        of them."""
        answer = await self._ask(AskPacks(), Packs)
        return self._granted(answer.packs, answer)

    async def token(self, token: int, layers: list[int] | None, top: int) -> TokenView:
        """A token's record as inspect.look_up finds it. Raises EngineError."""
        answer = await self._ask(AskToken(token, layers, top), TokenSeen)
        return self._granted(answer.view, answer)

    async def attribution(self, request: Request, targets: list[int] | None, against: int | None) -> Attribution:
        """What moved a prompt's logits, as attribution.attribute says. Raises EngineError."""
        answer = await self._ask(AskAttribution(request, targets, against), Attributed)
        return self._granted(answer.attribution, answer)

    async def _ask(self, question: ToEngine, kind: type[Answer]) -> Answer:
        """The answer to somebody who looks. Raises EngineError when the engine is gone or too busy to answer."""
        answer = await self._answering().ask(question, kind, LOOK_TIMEOUT_SECONDS)
        if answer is None:
            kind_of, message = ("dead", self.failure) if self.failure else ("slow", "the engine is in a long step")
            raise EngineError(kind_of, message)
        return answer

    async def resize(self, device_cache: str | None, host_cache: str | None) -> CacheSizes:
        """Change the tiers' sizes, in the options' words, after the step that runs; returns those in force. An engine
        that replaces this one has the options' sizes again. Raises EngineError; nothing is changed then.
        """
        answer = await self._answering().ask(Resize(device_cache, host_cache), Resized, None)
        return self._granted(answer.sizes if answer is not None else None, answer)

    async def reopen(self) -> dict[str, Any]:
        """Go on with the table that lies at the table's path now; returns what table.describe says of it.

        Raises EngineError; the old one stays in use then.
        """
        answer = await self._answering().ask(Reopen(), Reopened, None)
        facts = self._granted(answer.facts if answer is not None else None, answer)
        return facts

    def _granted(
        self, value: Granted | None, answer: Resized | Reopened | TokenSeen | Attributed | Packs | None
    ) -> Granted:
        """What was asked for. Questions that change something wait however long the step before them takes: who was
        told to try again would not know what holds. No answer means that the engine is gone."""
        if answer is not None and answer.declined is not None:
            raise EngineError(answer.declined.kind, answer.declined.message)
        if value is None:
            raise EngineError("dead", self.failure or "the engine is gone")
        return value

    async def metrics(self) -> list[Metric]:
        """The numbers of all incarnations together, fresh if the engine answers in time, else the last it sent; and how
        it has lived. Counters never fall; gauges are 0 while no engine answers."""
        if self._child is not None and self.ready is not None:
            await self._child.ask(AskMetrics(), MetricsSnapshot, METRICS_TIMEOUT_SECONDS)
        now = self._child.metrics if self._child is not None and self.ready is not None else []
        self._up.set(1.0 if self.ready is not None else 0.0)
        return [*merge(self._past, now), *self._own.snapshot()]
