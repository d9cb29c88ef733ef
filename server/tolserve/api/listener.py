"""uvicorn as this server needs it: how it stops, and how long it waits for a client to finish a request."""

import asyncio
import logging
import os
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tolserve.api.state import Server

log = logging.getLogger(__name__)

# A client that sends less is broken or means harm: headers fit one packet, and 4 MiB in a minute is 70 kB/s.
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0


class Listener(uvicorn.Server):
    """The first SIGTERM or SIGINT lets running requests finish inside the deadline; a second one ends everything."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. uvicorn would close the socket at once, and end with the signal instead of status 0."""
        if self._server.stopping_since is not None:
            try:
                self._server.engine.kill()
            finally:
                os._exit(128 + sig)
        self._server.stopping_since = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's main loop asks ten times a second whether to go on to its shutdown."""
        if (since := self._server.stopping_since) is not None and not self.should_exit:
            self.should_exit = self._drained(time.monotonic() - since)
        return await super().on_tick(counter)

    def _drained(self, seconds: float) -> bool:
        running = len(self.server_state.tasks)
        if not running:
            log.info("stopping: nothing runs any more")
        elif seconds >= self._server.settings.shutdown_timeout:
            log.warning("stopping: %d requests did not finish in time", running)
            self._server.engine.give_up("the server stopped before the answer was complete")
        else:
            return False
        return True


class TimedProtocol(H11Protocol):
    """Closes a connection whose client does not finish a request's headers, or its body, in time."""

    limits: dict[Any, float] = {h11.IDLE: HEADER_SECONDS, h11.SEND_BODY: BODY_SECONDS}  # noqa: RUF012

    _phase: Any = None  # what the client is in the middle of
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        super().connection_lost(exc)

    def _watch(self) -> None:
        state = self.conn.their_state
        self._enter(state if state in self.limits else None)

    def _enter(self, phase: Any) -> None:
        """A phase's time runs from its first byte, however many follow."""
        if phase is self._phase:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._phase, self._timer = phase, None
        if phase is not None:
            self._timer = self.loop.call_later(self.limits[phase], self.transport.abort)
