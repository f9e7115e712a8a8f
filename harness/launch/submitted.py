"""Which jobs were submitted for what: kept in the folder of a run or suite, so that the same command finds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from harness.core import files, readback
from harness.core.types import UserError

_REMEDY = "delete it once none of its jobs is in the queue any more"


class JobEntry(msgspec.Struct, frozen=True):
    """A job that was submitted."""

    id: str  # of a task of an array: 12_3
    name: str  # of the job, by which a number that Slurm has given out anew is told from it


class Submitted:
    """The jobs of a folder.

    Args:
        folder: of the scripts and logs; `jobs.json` is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "jobs.json"

    def read(self) -> dict[str, JobEntry]:
        """What was submitted for each run, by its name; for a run by itself under `run`.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.exists():
            return {}
        content = readback.content_of(self.path, _REMEDY)
        return readback.decode_json(self.path, content, dict[str, JobEntry], _REMEDY)

    def add(self, jobs: dict[str, JobEntry]) -> None:
        """Notes jobs that were submitted, in place of what was noted under their names."""
        content = msgspec.json.encode(self.read() | jobs)
        files.write_atomically(self.path, msgspec.json.format(content, indent=1))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other commands from submitting the same while this one looks what there is, and submits.

        Raises:
            UserError: another one does so now.
        """
        files.make_folder(self.folder)
        with files.open_to_append(self.folder / "submitting.lock") as file:
            try:
                files.take_lock(file, wait=False)
            except BlockingIOError as error:
                raise UserError(
                    f"another command submits the jobs of {self.folder.parent} now: start this one again in a moment"
                ) from error
            yield
