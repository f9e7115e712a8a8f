"""The command line: `ssodbench COMMAND key=value ...`."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import harness
from harness.commands import help
from harness.commands.usage import COMMANDS
from harness.core.console import STDERR, settle
from harness.core.escape import never_refuse, plain
from harness.core.files import open_closed_streams, refusal, require_working_folder
from harness.core.stopping import note_failure
from harness.core.types import RunError, UserError
from harness.core.validate import near


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see ssodbench --help")


def _run(given: list[str], places: dict[str, str]) -> int:
    """`main` without its errors.

    Raises:
        UserError: a mistake in what was given.
    """
    parser = _Parser(prog="ssodbench", add_help=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("--config-dir", action="append", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--completion")
    parser.add_argument("--sources", action="store_true")
    parser.add_argument("overrides", nargs="*")
    known, unknown = parser.parse_known_intermixed_args(given)
    if known.version:
        print(f"ssodbench {harness.__version__}")
        return 0
    if known.completion is not None:
        print(help.completion(known.completion), end="")
        return 0
    if not unknown and (known.help or not known.command) and known.command in (None, *COMMANDS):
        print(help.command_help(known.command) if known.command else help.overview(), end="")
        return 0 if known.help else 2
    if unknown:
        hint = near(unknown[0].split("=")[0], ("--config-dir", "--help", "--version", "--completion"))
        raise UserError(
            f"the option {unknown[0]} is not known{hint}: settings are given as key=value, see ssodbench --help"
        )
    if known.command not in COMMANDS:
        hint = near(known.command, COMMANDS) or f": choose one of {', '.join(COMMANDS)}"
        raise UserError(f"the command {known.command} is not known{hint}")
    from harness.config import compose, paths

    cfg = compose.load(keyed(known.command, known.overrides), known.config_dir)
    places.update(paths.places(cfg))
    module = importlib.import_module(f"harness.commands.{known.command}")
    if known.sources and known.command != "config":
        raise UserError("--sources belongs to `ssodbench config`: leave it out")
    code: int = module.run_with_sources(cfg) if known.sources else module.run(cfg)
    _flush_output()
    return code


def keyed(command: str, given: list[str]) -> list[str]:
    """The command line with the key put before the one value that may stand alone.

    Raises:
        UserError: there are two such values.
    """
    key = COMMANDS[command].positional
    alone = [word for word in given if key and "=" not in word and not word.startswith("~")]
    if len(alone) > 1:
        raise UserError(f"{command} takes one value without a key, not {' and '.join(alone)}: put a name in quotes")
    return [f"{key}={word}" if word in alone else word for word in given]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit code."""
    try:
        code = _main(arguments)
    except Exception:
        note_failure(1)
        raise
    note_failure(code)
    settle()
    return code


def _main(arguments: Sequence[str] | None) -> int:
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        never_refuse(stream)
    places: dict[str, str] = {}
    try:
        require_working_folder()
        return _run(list(sys.argv[1:] if arguments is None else arguments), places)
    except (UserError, RunError) as error:
        return _tell(error)
    except KeyboardInterrupt:
        STDERR.say("ssodbench: interrupted")
        return 130
    except OSError as error:
        return _end_output(error) if _is_of_output(error) else _tell(refusal(error, places))


def _tell(error: UserError | RunError) -> int:
    """Says an error in one line; gives the exit code."""
    STDERR.say(f"ssodbench: {' '.join(plain(error).split())}")
    return 2 if isinstance(error, UserError) else 1


def _flush_output() -> None:
    """Writes what is pending, while it can still be told that it cannot be written."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _is_of_output(error: OSError) -> bool:
    """Whether it is the standard output that cannot be written, the one file that is written without being named."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _end_output(error: OSError) -> int:
    """Ends a command whose output cannot be written; in silence where its reader has gone (`... | head`)."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
    if isinstance(error, BrokenPipeError):
        return 0
    cause = error.strerror or str(error)
    return _tell(RunError(f"cannot write the output ({cause}): send it to a file or terminal that can be written"))


if __name__ == "__main__":
    sys.exit(main())
