"""tolserve on Ray Serve: each replica is one engine behind the API of `tolserve serve`.

Ray's proxy balances requests over the replicas; Ray starts, counts, checks and replaces them. serve.yaml says how many
and why. What is here only fits the server into a replica.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Response
from fastapi.routing import APIRoute
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tolserve import logs
from tolserve.api import metrics
from tolserve.api.app import create_app
from tolserve.api.errors import ApiError
from tolserve.api.routes import numbers
from tolserve.api.state import Server
from tolserve.metrics import Metric
from tolserve.settings import ServeSettings

# An engine is back in a few seconds; one that is not back after this long gets a clear 503 instead.
HOLD_SECONDS = 30.0
# Each engine has a second to send fresh numbers. Prometheus gives a scrape ten seconds by default.
METRICS_SECONDS = 5.0
# Options of `tolserve serve` that Ray decides here: http_options, graceful_shutdown_timeout_s, and this file itself.
_NOT_OURS = frozenset({"host", "port", "shutdown_timeout", "config"})


class Hold:
    """Lets new work wait while this replica's engine restarts.

    A replica that answered 503 at once would have the shortest queue of all, and Ray would send it the most requests.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            deadline = time.monotonic() + HOLD_SECONDS
            while self._server.engine.ready is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        await self.app(scope, receive, send)


class OneRequestId:
    """Leaves x-request-id to Ray's proxy, which gives every request one and would send ours as a second header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without)


def by_replica(snapshots: Mapping[str, list[Metric]]) -> list[Metric]:
    """One snapshot of several replicas' numbers: every series gets its replica's id as the label `replica`."""
    merged: dict[str, Metric] = {}
    for name, snapshot in snapshots.items():
        for metric in snapshot:
            empty = replace(metric, label_names=("replica", *metric.label_names), samples=[])
            family = merged.setdefault(metric.name, empty)
            family.samples += [replace(sample, labels=(name, *sample.labels)) for sample in metric.samples]
    return list(merged.values())


@serve.ingress()
class Replica:
    """The API and, as a child process, its engine. Ray calls the methods."""

    def __init__(self, settings: ServeSettings) -> None:
        logs.configure(settings.log_format, settings.log_level, "api")
        self._settings = settings
        self._was_ready = False

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The server's application. Ray runs its lifespan, which starts and stops the engine."""
        app = create_app(self._settings)
        self._server: Server = app.state.server
        # A scrape reaches any one of the replicas, so that one answers for all. The first route that fits is taken.
        app.router.routes.insert(0, APIRoute("/metrics", self._metrics_page))
        app.add_middleware(Hold, server=self._server)
        app.add_middleware(OneRequestId)
        return app

    async def check_health(self) -> None:
        """Raises while the engine is dead; after three times in a row Ray replaces the replica.

        Ray's first call is part of the replica's start and waits for the model: no request comes before that.
        """
        engine = self._server.engine
        while not self._was_ready and engine.alive:
            self._was_ready = engine.ready is not None
            await asyncio.sleep(0.05)
        if not engine.alive:
            raise RuntimeError(engine.failure or "the engine is gone")

    async def numbers(self) -> tuple[str, list[Metric]]:
        """This replica's id and numbers."""
        return serve.get_replica_context().replica_tag, await numbers(self._server)

    async def _metrics_page(self) -> Response:
        """The numbers of all replicas in Prometheus' text format. 503 if one of them does not answer in time."""
        context = serve.get_replica_context()
        handle: DeploymentHandle[Any] = serve.get_deployment_handle(context.deployment, context.app_name)
        answers = handle.broadcast("numbers").results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        try:
            # A replica that died since has an exception for an answer, and no numbers any more.
            snapshots = dict(answer for answer in await answers if not isinstance(answer, BaseException))
        except TimeoutError:
            raise ApiError(503, f"a replica did not send its numbers in {METRICS_SECONDS:.0f} s") from None
        return Response(metrics.render(by_replica(snapshots)), media_type=metrics.CONTENT_TYPE)


def build(args: dict[str, Any]) -> serve.Application:
    """What serve.yaml imports; `args` are options of `tolserve serve`. Raises ValueError for those that are none, and
    for those that would do nothing here."""
    given = {name.replace("-", "_"): value for name, value in args.items()}
    if idle := sorted(_NOT_OURS & given.keys()):
        raise ValueError(f"args: {', '.join(idle)} have no effect under Ray Serve; see its own options in serve.yaml")
    return serve.deployment(name="tolserve")(Replica).bind(ServeSettings(**given))
