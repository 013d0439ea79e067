"""A task's folder on the disk: opened under a lock, written so that a reader never sees half a file.

Nothing here waits for the disk: what a power cut takes is written again from the rows, see `boot`.
"""

import errno
import fcntl
import itertools
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tower.faults import fault

#: Where what stood in the way is moved to, beside the folders of tasks.
LOST = ".lost"

#: What the name of a folder begins with while it is being removed, and while it is being made.
_GONE, _NEW = ".gone-", ".new-"
#: Names of folders that are being made, as nobody else takes them: another process, on this machine or elsewhere, has another number.
_MAKER, _made = uuid.uuid4(), itertools.count()
#: A folder that is still being made after so many seconds is a leftover of a crash.
_MADE_S = 60.0

#: How long another writer of the same folder is waited for, and how often it is asked for meanwhile.
_PATIENCE_S, _PAUSE_S = 1.0, 0.02
_PIECE = 256 * 1024


class Folder:
    """An open folder of a task; nothing in it is ever reached through a symbolic link."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def replace(self, name: str, data: bytes | Iterable[bytes]) -> int:
        """Make a file hold exactly this, so that a reader sees the old or the new, never half; return its size."""
        beside = f".{name}.new"
        fd = self._create(beside)
        try:
            size = _fill(fd, [data] if isinstance(data, bytes) else data)
            fault("trace.after_temporary")
            os.rename(beside, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            with suppress(OSError):
                self.remove(beside)  # on a full disk it would stand in its own way
            raise
        fault("trace.after_rename")
        return size

    def _create(self, name: str) -> int:
        try:
            return _create(name, self._fd)
        except FileExistsError:  # of a crash, or put there by somebody else
            self.remove(name)
            return _create(name, self._fd)

    def append(self, name: str, offset: int, data: bytes) -> bool:
        """Write at a known offset and cut what a crash left behind it; False if no file of ours reaches that far."""
        info = self._look(name)
        if info and not (stat.S_ISREG(info.st_mode) and info.st_nlink == 1):
            return False  # something else stands there, or it has another name as well, such as one in a backup
        flags = os.O_RDWR | os.O_NOFOLLOW | (0 if offset else os.O_CREAT)
        try:
            fd = os.open(name, flags, 0o644, dir_fd=self._fd)
        except FileNotFoundError:
            return False
        with open(fd, "r+b", buffering=0) as file:
            if os.fstat(fd).st_size < offset:
                return False
            file.truncate(offset)
            try:
                _write_all(fd, data, offset)
            except OSError:
                with suppress(OSError):
                    file.truncate(offset)  # half a line is no line
                raise
        return True

    def has(self, name: str) -> bool:
        """Whether a regular file of that name is there."""
        return self.size(name) is not None

    def size(self, path: str) -> int | None:
        """Return the size of a regular file in the folder or in one inside it; None if there is none."""
        first, _, rest = path.partition("/")
        if rest:
            if not self.has_folder(first):
                return None
            with self.inner(first, make=False) as inside:
                return inside.size(rest)
        info = self._look(first)
        return info.st_size if info and stat.S_ISREG(info.st_mode) else None

    def is_barred(self, path: str) -> bool:
        """Whether something stands where a file should be, or a folder on the way to it, that is neither."""
        first, _, rest = path.partition("/")
        info = self._look(first)
        if info is None or not rest:
            return info is not None and not stat.S_ISREG(info.st_mode)
        if not stat.S_ISDIR(info.st_mode):
            return True
        with self.inner(first, make=False) as inside:
            return inside.is_barred(rest)

    def has_folder(self, name: str) -> bool:
        """Whether a folder of that name is there, and no link to one."""
        info = self._look(name)
        return bool(info and stat.S_ISDIR(info.st_mode))

    def names(self) -> list[str]:
        """Return what is in the folder, sorted, hidden names too."""
        return sorted(os.listdir(self._fd))

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a regular file piece by piece; raise OSError for anything else."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._fd)
        with open(fd, "rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def _look(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file, or the link that stands in its place."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    @contextmanager
    def inner(self, name: str, *, make: bool = True) -> Iterator["Folder"]:
        """Open a folder inside this one, making it if need be."""
        with _open_folder(name, self._fd, make) as fd:
            yield Folder(fd)


def _create(name: str, parent: int) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=parent)


def _fill(fd: int, parts: Iterable[bytes]) -> int:
    """Write and close a new file; every error of the disk is raised here, also one that it tells only at the end."""
    size = 0
    try:
        for part in parts:
            _write_all(fd, part, size)
            size += len(part)
    finally:
        os.close(fd)
    return size


def _write_all(fd: int, data: bytes, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


class TaskFolder(Folder):
    """The folder of a task itself, locked against other writers."""

    def __init__(self, fd: int, top: int, name: str) -> None:
        super().__init__(fd)
        self._top, self._name = top, name

    def is_in_place(self) -> bool:
        """Whether the folder still has its name: somebody may have removed or moved it since it was opened."""
        try:
            now = os.stat(self._name, dir_fd=self._top, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(now, os.fstat(self._fd))

    def check_place(self) -> None:
        """Raise OSError if the folder has been removed or moved."""
        if not self.is_in_place():
            raise FileNotFoundError(errno.ENOENT, "the folder was taken away while it was written", self._name)

    def drop_if_empty(self) -> None:
        """Remove the folder again if nothing is in it."""
        with suppress(OSError):
            os.rmdir(self._name, dir_fd=self._top)


@contextmanager
def open_folder(root: Path, task_id: str, *, make: bool = True) -> Iterator[TaskFolder]:
    """Open and lock a task's folder, making it if need be; raise BlockingIOError if another writer keeps it."""
    top = _open_top(root, make)
    try:
        while True:
            with _open_folder(task_id, top, make) as fd:
                _lock(fd)
                folder = TaskFolder(fd, top, task_id)
                if folder.is_in_place():  # else it was moved away while we waited
                    yield folder
                    return
    finally:
        os.close(top)


class Top(Folder):
    """TRACE_DIR itself, open."""

    def __init__(self, root: Path) -> None:
        super().__init__(_open_top(root, make=True))
        self._root = root

    def __enter__(self) -> "Top":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def is_free(self, name: str) -> bool:
        """Whether nothing has that name."""
        return self._look(name) is None

    def make(self, task_id: str, files: Iterable[tuple[str, bytes]]) -> bool:
        """Make the folder of a task with these files; it appears whole, or not at all if there is one by now: then return False.

        That costs half as much as to bring a folder up file by file.
        """
        beside = f"{_NEW}{_MAKER}-{os.getpid()}-{next(_made)}"
        is_named = False
        os.mkdir(beside, dir_fd=self._fd)
        try:
            with _open_folder(beside, self._fd, make=False) as fd:
                for name, data in files:
                    _fill(_create(name, fd), [data])
                    fault("trace.after_temporary")
            is_named = self._rename(beside, task_id)
        finally:
            if not is_named:
                _discard(self._root / beside)
        fault("trace.after_rename")
        return is_named and not self.is_free(task_id)  # it may have been taken away at once

    def _rename(self, beside: str, task_id: str) -> bool:
        if not self.is_free(task_id):  # the system would replace an empty folder
            return False
        try:
            os.rename(beside, task_id, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                return False
            raise
        return True


def _open_top(root: Path, make: bool) -> int:
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        if not make:
            raise
        root.mkdir(parents=True, exist_ok=True)
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY)


def _lock(fd: int) -> None:
    """Wait a moment for another writer, not longer: a thread that hangs here is one less for other tasks."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


@contextmanager
def _open_folder(name: str, parent: int, make: bool) -> Iterator[int]:
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def set_aside(root: Path, name: str) -> Path:
    """Move what stands in TRACE_DIR under this name to its .lost, under a free name; return where it is now."""
    lost = root / LOST
    lost.mkdir(exist_ok=True)
    if lost.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(lost))
    for number in range(1000):
        place = lost / (f"{name}.{number}" if number else name)
        if not os.path.lexists(place):
            os.rename(root / name, place)
            return place
    raise FileExistsError(errno.EEXIST, "too many of that name were set aside", str(lost / name))


def remove_folder(root: Path, task_id: str) -> None:
    """Remove a task's folder: out of sight at once, whole, and then piece by piece; what a kill leaves is removed by `remove_leftovers`."""
    try:
        with _unwritten(root / task_id):
            os.rename(root / task_id, root / f"{_GONE}{task_id}")
    except FileNotFoundError:
        return  # it never had one, or somebody else removes it
    _discard(root / f"{_GONE}{task_id}")


def remove_empty(root: Path, task_id: str) -> None:
    """Remove a task's folder if there is nothing in it."""
    with suppress(OSError):
        os.rmdir(root / task_id)


def remove_leftovers(root: Path) -> None:
    """Remove what is left of folders whose removal, or making, was broken off."""
    try:
        with os.scandir(root) as entries:
            left = [entry.path for entry in entries if entry.name.startswith(_GONE) or _is_forgotten(entry)]
    except FileNotFoundError:
        return
    for path in left:
        _discard(Path(path))


def _is_forgotten(entry: "os.DirEntry[str]") -> bool:
    """Whether this is a folder that somebody has begun to make, and makes no more."""
    if not entry.name.startswith(_NEW):
        return False
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _MADE_S
    except FileNotFoundError:
        return False


@contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    """Wait for a writer of the folder; whatever else stands in its place has none."""
    if path.is_symlink() or not path.is_dir():
        yield
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is a leftover for the next pass
