"""The engine's heartbeats: a thread that says twice a second that the process runs, and for how long its step has."""

import threading

import zmq

from tolserve.engine.messages import Heartbeat, encode

PERIOD_SECONDS = 0.5


class Pulse:
    """Beats from `start` to `close`. The step loop tells it when a step begins and ends."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._step: int | None = None  # number of the step that runs now
        self._steps = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def step_begins(self) -> None:
        self._steps += 1
        self._step = self._steps

    def step_ends(self) -> None:
        self._step = None

    def _beat(self) -> None:
        """A step's age is counted in beats: time in which the whole machine stood still is not held against it."""
        # A socket belongs to one thread, so this one has its own.
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._address)
        seen: int | None = None
        beats = 0
        while True:
            step = self._step
            beats = beats + 1 if step is not None and step == seen else 0
            seen = step
            try:
                socket.send(encode(Heartbeat(beats * PERIOD_SECONDS)), zmq.NOBLOCK)
            except zmq.Again:
                pass  # nobody reads: the API process is stopped itself, or gone
            if self._closing.wait(PERIOD_SECONDS):
                break
        context.destroy(linger=0)
