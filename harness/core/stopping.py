"""How a run ends before its time: on a signal, which it survives with its state saved, or because it cannot go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

FAILURE_VARIABLE = "SSODBENCH_FAILURE"  # names the file of `note_failure`
REPEAT_SECONDS = 2.0  # within which a launcher passes on a signal that its workers may have got as well


class Interrupted(Exception):  # noqa: N818  not an error
    """The run was asked to stop and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Interrupted, (self.signal_number,)  # what the other ranks are told


def stop_code(signal_number: int) -> int:
    """Exit code of a process that a signal has stopped, as shells have it."""
    return 128 + signal_number


def note_failure(code: int) -> None:
    """Keeps the exit code of the process that fails first, where the launcher of a group names a file for it.

    A launcher that then ends the others may be left with their exit code, that of a run that was asked to stop.

    Args:
        code: of this process; nothing is kept of 0, nor of one that a signal has stopped.
    """
    path = os.environ.get(FAILURE_VARIABLE)
    if path and 0 < code < stop_code(1):
        with suppress(OSError), Path(path).open("x") as file:  # of several the first
            file.write(f"{code}\n")


def stop_signals() -> list[int]:
    """The signals that ask to stop: SIGHUP, which a closed terminal sends, unless it is ignored, as under `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


class StopRequest:
    """The signals that asked to stop: the first lets what is under way end in order, a second ends the process at once.

    Ctrl-C reaches a launcher and its workers, and the launcher passes it on: to a worker that is one signal. A terminal
    that closes sends SIGHUP, and so does its shell, and a machine that shuts down does after SIGTERM: none is a second.

    Args:
        second_ends: whether a second signal ends the process; otherwise they are counted.
    """

    def __init__(self, second_ends: bool = True) -> None:
        self.signal_number = 0  # of the last one
        self.count = 0
        self._second_ends = second_ends
        self._received = 0.0
        self._raises = False

    def install(self, numbers: Sequence[int] | None = None) -> None:
        """Takes over the signals that ask this process to stop, by default those of `stop_signals`."""
        for number in stop_signals() if numbers is None else numbers:
            signal.signal(number, self._receive)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`install` for the block alone; in a thread, which gets no signals, nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in stop_signals()}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
        if self.signal_number and self._second_ends:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number, self._received, self.count = number, now, self.count + 1
        if self._raises:
            raise Interrupted(number)
