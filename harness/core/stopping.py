"""How a run ends before its time: on a signal, which it survives with its state saved, or because it cannot go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REPEAT_SECONDS = 2.0  # within which a launcher passes on a signal that its workers may have got as well


class Interrupted(Exception):  # noqa: N818  not an error
    """The run was asked to stop and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Interrupted, (self.signal_number,)  # what the other ranks are told


def stop_signals() -> list[int]:
    """The signals that ask to stop: SIGHUP, which a closed terminal sends, unless it is ignored, as under `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


class StopRequest:
    """A signal asks the loop to finish its step and save; a second one ends the process at once.

    Ctrl-C reaches a launcher and its workers, and the launcher passes it on: to a worker that is one signal. A terminal
    that closes sends SIGHUP, and so does its shell, and a machine that shuts down does after SIGTERM: none is a second.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._received = 0.0
        self._raises = False

    def install(self, numbers: Sequence[int] | None = None) -> None:
        """Takes over the signals that ask this process to stop, by default those of `stop_signals`."""
        for number in stop_signals() if numbers is None else numbers:
            signal.signal(number, self._receive)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While nothing is trained there is nothing to save: in this block a signal raises Interrupted where we are."""
        self._raises = True
        try:
            if self.signal_number:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self._raises = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP and self.signal_number:
            return
        passed_on = "LOCAL_RANK" in os.environ and number == self.signal_number
        if passed_on and now - self._received < REPEAT_SECONDS:
            return
        if self.signal_number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number, self._received = number, now
        if self._raises:
            raise Interrupted(number)


@dataclass
class StopSignal:
    """Which signal asked to stop, and how often."""

    number: int = 0
    count: int = 0


@contextmanager
def collecting_stops() -> Iterator[StopSignal]:
    """Collects the signals that ask to stop while inside, so that the cells can be stopped in order."""
    stop = StopSignal()

    def receive(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGHUP or not stop.number:  # a terminal that closes sends it, and so does its shell
            stop.number, stop.count = number, stop.count + 1

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, receive) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
