"""The FastAPI application and the process that serves it."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from tolserve import __version__, logs
from tolserve.api import admin, chat, completions, console, errors, memory, routes
from tolserve.api.edge import Auth, BodyLimit, Edge
from tolserve.api.listener import Listener, TimedProtocol
from tolserve.api.state import Server
from tolserve.api.tokenizer import ModelFiles
from tolserve.engine.client import EngineClient, EngineError
from tolserve.settings import ServeSettings

log = logging.getLogger(__name__)

# Longer than the pauses of a client that works through a conversation, shorter than common proxies' minute.
KEEP_ALIVE_SECONDS = 30
# Once requests were told that the server stops, clients get this long to read it.
GOODBYE_SECONDS = 2
# Request line and headers together. h11 would take any size that comes in one event; browsers stay far below.
HEADER_BYTES = 32 * 1024


def create_app(settings: ServeSettings) -> FastAPI:
    """The application; its lifespan starts and stops the engine process.

    Raises ModelFilesError for a model directory whose tokenizer files cannot be served.
    """
    server = Server(settings, ModelFiles.load(settings.model), EngineClient(settings.engine_json()))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        try:
            yield
        finally:
            await server.engine.stop()

    app = FastAPI(
        title="tolserve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # the page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    errors.install(app)
    for part in (completions, chat, routes, memory, admin, console):
        app.include_router(part.router)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit)
    if (key := settings.key()) is not None:
        app.add_middleware(Auth, key=key)
    app.add_middleware(Edge, metrics=server.metrics)
    return app


def serve(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM. Ends the process with status 1 when the engine ends before it was ever ready."""
    logs.configure(settings.log_format, settings.log_level, "api")
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=TimedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    try:
        asyncio.run(_serve(Listener(config, app.state.server), app.state.server))
    except EngineError as error:
        log.critical("%s", error)
        sys.exit(1)


async def _serve(http: uvicorn.Server, server: Server) -> None:
    watch = asyncio.create_task(_watch_start(http, server))
    await http.serve()
    await watch
    if not http.started:
        raise EngineError("dead", "the server could not start; the log says why")


async def _watch_start(http: uvicorn.Server, server: Server) -> None:
    """A server whose engine cannot start has nothing to offer: end it. One that dies later is replaced."""
    while server.engine.ready is None and not http.should_exit:
        if server.engine.failure is not None:
            http.should_exit = True
            raise EngineError("dead", f"the engine could not start: {server.engine.failure}")
        await asyncio.sleep(0.1)
    if not http.should_exit:
        log.info("ready: model %s, %d tokens of context", server.settings.model_name, server.max_model_len)
