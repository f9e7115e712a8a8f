"""A process that has imported everything once, and forks for every cell of a suite.

Importing torch, torchvision, DALI and numba takes each process some 4 CPU-seconds; a forked one begins at once, and
shares the memory of what was imported. The server never touches a GPU, which does not survive a fork, so that suites on
GPUs start their cells anew.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from harness.core.files import open_to_append

_PRELOAD = (
    "harness.commands.train",
    "harness.config.compose",
    "harness.engine.session",
    "harness.launch.local",
    "harness.data.shapes",
    "detectors.faster_rcnn",
    "detectors.methods.teacher",
    "pipelines.dali.pipeline",  # an extra: left out where it is not installed
)
_PROGRAM = "harness.cli"  # what a cell runs, as on a command line
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_PAUSE = 0.1  # seconds between looks at cells that may have ended


class ForkServer:
    """The suite's side of the server.

    Args:
        environment: of the server; the numbers of threads in it hold for its cells too.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.suite.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # what a terminal signals is for the suite alone
        )
        self._codes: dict[int, int] = {}
        self._rest = b""

    def start(self, arguments: list[str], log: Path, environment: dict[str, str]) -> ForkedCell:
        """Forks a process that runs `ssodbench ARGUMENTS`.

        Args:
            arguments: of the command line.
            log: where its output is appended.
            environment: of the process.

        Raises:
            OSError: the server has gone, or the system refuses another process.
        """
        assert self._server.stdin is not None
        request = {"arguments": arguments, "log": str(log), "environment": environment}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        while True:
            for answer in self._answers(wait=True):
                if "started" in answer:
                    return ForkedCell(self, answer["started"])
                raise OSError(answer["errno"], answer["reason"])

    def code(self, pid: int, wait: bool) -> int | None:
        """Exit code of a process that was forked, -n after signal n; None while it runs."""
        while pid not in self._codes:
            answers = self._answers(wait)
            assert not answers, "what starts a process is answered before another is asked for"
            if not wait:
                break
        return self._codes.get(pid)

    def close(self) -> None:
        """Ends the server, and asks what it has forked to save and stop."""
        assert self._server.stdin is not None
        with suppress(OSError):
            self._server.stdin.close()
        self._server.wait()

    def _answers(self, wait: bool) -> list[dict[str, Any]]:
        """What the server has said but of ends, which are noted.

        Raises:
            OSError: it has gone.
        """
        assert self._server.stdout is not None
        if not wait and not select.select([self._server.stdout], [], [], 0)[0]:
            return []
        said = os.read(self._server.stdout.fileno(), 2**16)
        if not said:
            raise BrokenPipeError("the process that starts the cells has gone")
        *lines, self._rest = (self._rest + said).split(b"\n")
        answers = [json.loads(line) for line in lines]
        self._codes.update({answer["ended"]: answer["code"] for answer in answers if "ended" in answer})
        return [answer for answer in answers if "ended" not in answer]


class ForkedCell:
    """A process of the server, as `subprocess.Popen` has it."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid

    @property
    def returncode(self) -> int:
        """Exit code, once `poll` has given it."""
        code = self.poll()
        assert code is not None
        return code

    def poll(self) -> int | None:
        """Exit code, or None while it runs; where the server was killed, so was this."""
        try:
            return self._server.code(self.pid, wait=False)
        except OSError:
            return -signal.SIGKILL

    def terminate(self) -> None:
        """Asks it to save and stop."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Waits for its end."""
        try:
            code = self._server.code(self.pid, wait=True)
        except OSError:
            return -signal.SIGKILL
        assert code is not None
        return code


def end_with_parent(parent: int) -> None:
    """Lets the system send this process a SIGTERM when its parent has ended, however it ended. Linux alone can do so.

    Args:
        parent: the process that should be the parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        signal.raise_signal(signal.SIGTERM)


def _serve() -> None:
    """Forks for each line of stdin until that is closed; tells on stdout what has started and ended."""
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    for name in _PRELOAD:
        with suppress(ImportError):
            importlib.import_module(name)
    children: set[int] = set()
    rest = b""
    while True:
        if select.select([requests], [], [], _PAUSE)[0]:
            said = os.read(requests, 2**16)
            if not said:
                return  # the system tells the children
            *lines, rest = (rest + said).split(b"\n")
            for line in lines:
                _answer(answers, _fork(json.loads(line), children, (requests, answers)))
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                _answer(answers, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _answer(answers: int, content: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(answers, json.dumps(content).encode() + b"\n")


def _fork(request: dict[str, Any], children: set[int], pipes: tuple[int, int]) -> dict[str, Any]:
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return {"errno": error.errno, "reason": error.strerror}
    if pid:
        children.add(pid)
        return {"started": pid}
    for pipe in pipes:
        os.close(pipe)
    _become_cell(request, server)


def _become_cell(request: dict[str, Any], server: int) -> NoReturn:
    """The forked process: a session, an environment, streams and an end of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    with open(os.devnull, "rb") as nothing, open_to_append(request["log"]) as output:
        for stream, file in ((0, nothing), (1, output), (2, output)):
            os.dup2(file.fileno(), stream)
    end_with_parent(server)
    main = importlib.import_module(_PROGRAM).main
    sys.argv = ["ssodbench", *request["arguments"]]
    sys.exit(main(request["arguments"]))


if __name__ == "__main__":
    _serve()
