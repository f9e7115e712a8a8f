"""Files: written in one move, read only where they are regular, and what the system refuses said in one sentence.

The functions here raise `OSError` as the system gives it, with the path that the user knows as its `filename`.
`refusal` makes the sentence of any such error, and the command line calls it for what nobody has told better.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from harness.core.errors import RunError, UserError

SHARED_MEMORY = Path("/dev/shm")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # of file systems without locks

# The machine's state rather than a path that was given: exit code 1.
_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EBADF,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
)
_REMEDIES = {
    errno.ENOSPC: "free space on that disk, by deleting old runs for instance, and start the same command again",
    errno.EDQUOT: "free space within your quota, by deleting old runs for instance, and start the same command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and start the same command again",
    errno.EIO: "the disk fails, look at the system's log",
    errno.ESTALE: "the network's file server has lost it, mount the folder anew and start the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and start the same command again",
    errno.ENFILE: "the machine has too many open files, end other programs and start the same command again",
    errno.ENOMEM: "free memory and start the same command again",
    errno.EAGAIN: "raise the limit of processes (ulimit -u) or end other programs, and start the same command again",
    errno.ENOENT: "give one that is there",
    errno.ENOTDIR: "a part of that path is a file, give another",
    errno.EISDIR: "give a file",
    errno.EEXIST: "something else has that name, give another",
    errno.ENOTEMPTY: "another process writes there, wait for it to end",
    errno.ENAMETOOLONG: "give shorter names",
    errno.ELOOP: "mend the symbolic links, which lead to each other",
    errno.EACCES: "give one that this user may read and write, or change its permissions",
    errno.EPERM: "give one that this user may read and write, or change its permissions",
    errno.EBADF: "send it to a file or a terminal",
    errno.EROFS: "give one on a file system that can be written",
    errno.ENOLCK: "give a folder on a local disk",
    errno.ENOSYS: "give a folder on a local disk",
    errno.EOPNOTSUPP: "give a folder on a local disk",
}
_OTHERWISE = "give another, or mend what the system names"


def refusal(
    error: OSError, places: Mapping[str, str | Path | None] | None = None, remedy: str | None = None
) -> UserError | RunError:
    """An OSError as an error that a person can act on: path, cause and remedy.

    Args:
        error: as the system raised it.
        places: configuration key -> its path; the key under whose path the error happened is named.
        remedy: instead of what the kind of error suggests.

    Returns:
        UserError (exit code 2) where another path would do, RunError (1) where the machine is at its end.
    """
    path = _path_of(error)
    cause = error.strerror or str(error) or type(error).__name__
    if not _has_working_folder() and not (path and os.path.isabs(path)):
        return UserError(f"cannot use {path or 'a file'} ({cause}): {_GONE}")
    kind = RunError if error.errno in _MACHINE else UserError
    if remedy is None:
        key = key_of(path, places or {})
        remedy = _REMEDIES.get(error.errno or 0, _OTHERWISE)
        remedy += f"; {key} says where it is" if kind is RunError and key else f", by {key}=PATH" if key else ""
    return kind(f"cannot use {path or 'a file'} ({cause}): {remedy}")


def _path_of(error: OSError) -> str | None:
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | Path)]
    return os.fsdecode(names[-1]) if names else None


def key_of(path: str | Path | None, places: Mapping[str, str | Path | None]) -> str | None:
    """The key whose path is this one, or the nearest folder above it; also where the path is a part of the key's."""
    if path is None:
        return None
    parts = Path(os.path.abspath(path)).parts
    best: tuple[int, str] | None = None
    for key, place in places.items():
        own = Path(os.path.abspath(place)).parts if place else ()
        shared = min(len(own), len(parts))
        if shared > 1 and own[:shared] == parts[:shared] and (best is None or shared > best[0]):
            best = shared, key
    return best[1] if best else None


_GONE = "the working folder has been deleted, go to one that is there (cd DIR) and start the command again"


def open_closed_streams() -> None:
    """Opens what the caller has closed (`>&-`), so that no file of ours gets the number of a standard stream."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one


def require_working_folder() -> None:
    """Raises UserError where the working folder has been deleted or may not be read."""
    if not _has_working_folder():
        raise UserError(f"relative paths mean nothing here: {_GONE}")


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def home_path(path: str, key: str) -> str:
    """A path with `~` and `~user` at its beginning replaced by the home folder.

    Raises:
        UserError: there is no such user, nobody knows where the home folder is, or no file can have that name.
    """
    if "\0" in path or _is_not_text(path):
        raise UserError(f"{key}={path!a} cannot be the name of a file here: rename it, in UTF-8 and without NUL")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        name = path.split("/", 1)[0]
        why = f"there is no user {name[1:]}" if len(name) > 1 else "this user has no home folder, and HOME is not set"
        raise UserError(f"{key}={path} cannot be found, {why}: give the whole path, or ./{path} for that very name")
    return expanded


def _is_not_text(path: str) -> bool:
    """Whether a name holds bytes that are not UTF-8, which no record could hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def trouble(path: str | Path) -> str | None:
    """Why there is nothing to be used at a path, in the system's words; None where something is there."""
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    return None


def require_regular(path: str | Path) -> os.stat_result:
    """Raises OSError unless a path is a regular file: reading a FIFO or a device may never end. Gives its state."""
    return _require_regular(os.stat(path), path)


def _require_regular(state: os.stat_result, path: str | Path) -> os.stat_result:
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return state


def open_to_read(path: str | Path) -> BinaryIO:
    """A regular file, opened; does not wait for the other end of a FIFO.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    return _open_regular(path, "rb")


def open_to_append(path: str | Path) -> BinaryIO:
    """A regular file, made where it is missing, opened to write at its end; its folder is made too.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    make_folder(Path(path).parent)
    return _open_regular(path, "ab")


def _open_regular(path: str | Path, mode: str) -> BinaryIO:
    with contextlib.suppress(FileNotFoundError):
        require_regular(path)  # before it is opened, which can do something to a device
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))  # noqa: SIM115
    try:
        _require_regular(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file  # type: ignore[return-value]


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    with naming(path), open_to_read(path) as file:
        return file.read()


def read_picture(path: str) -> np.ndarray:
    """(N,) uint8, the bytes of a picture's file, which decoders take without another copy.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with contextlib.suppress(FileNotFoundError):
        require_regular(path)
    # Without Python's file object, which takes longer than reading does: a step reads a file for each image.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(file)
        _require_regular(status, path)
        data = np.empty(status.st_size, dtype=np.uint8)
        done = 0
        while done < len(data) and (count := os.readv(file, [data.data[done:]])):
            done += count
        return data[:done]
    finally:
        os.close(file)


def make_folder(path: Path) -> Path:
    """A folder, made with those above it where it is missing; gives the path back.

    Raises:
        OSError: it cannot be made, or a file has its name.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError the name that the user knows: writing names no file, and a temporary beside it says nothing."""
    try:
        yield
    except OSError as error:
        known = _path_of(error)
        if error.errno is not None and (known is None or Path(known).is_relative_to(Path(path).parent)):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end of the block, and is gone where the block fails.

    A reader (or a crash) sees the old file or the new one, never a part. The folder is made where it is missing.

    Args:
        path: what to replace; a device or a FIFO there is refused.
        durable: force the content to the disk; not needed for what only live readers use.

    Raises:
        OSError: naming `path`.
    """
    make_folder(path.parent)
    with naming(path):
        with contextlib.suppress(FileNotFoundError):
            require_regular(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replaces `path` by `content`; see `replacing`."""
    with replacing(path, durable) as file:
        file.write(content)


def require_writable(path: Path, key: str, folder: bool = False) -> None:
    """Raises UserError, before any work is done, where a result could not be written; makes nothing yet.

    Args:
        path: where it shall go.
        key: that says so, for the message.
        folder: whether `path` is a folder rather than a file.
    """
    where = f"{key}={path}"
    if not folder and path.is_dir():
        raise UserError(f"{where} is a folder: give a file name, such as {key}={path / 'result.json'}")
    why = trouble(path)
    if why is None and not folder and not path.is_file():
        raise UserError(f"{where} is not a regular file: give another name")
    if why not in (None, os.strerror(errno.ENOENT), os.strerror(errno.ENOTDIR)):
        raise UserError(f"{where} cannot be written ({why}): give another path")
    existing = next(p for p in (*((path,) if folder else ()), *path.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{where} cannot be written, {existing} is no folder that can be: give another {key}")


def take_lock(file: IO[Any], wait: bool) -> None:
    """Locks an open file for this process; the system frees it when the process ends, however it ends.

    Raises:
        BlockingIOError: another process has it, if not `wait`.
        OSError: the file system has no locks.
    """
    with naming(file.name):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in NO_LOCKS:
                cause = f"its file system has no locks: {error.strerror}"
                raise OSError(error.errno, cause, file.name) from error
            raise


def require_shared_memory(needed: int, what: str, remedy: str) -> None:
    """Checks that processes can share memory, which a container may not allow.

    Args:
        needed: bytes.
        what: that shares it.
        remedy: what to do without.

    Raises:
        UserError: there is no semaphore, or less memory than needed.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.parent.is_dir() else needed
    except (OSError, ImportError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(
            f"{what} needs shared memory, and {SHARED_MEMORY} cannot be used ({cause}): {remedy}"
        ) from error
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 2**20:.1f} MiB of shared memory, and {SHARED_MEMORY} has {free / 2**20:.1f} MiB: "
            f"enlarge it (docker run --shm-size=1g), or {remedy}"
        )
