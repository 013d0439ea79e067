"""A worker's lifeline: a file locked by the worker and its guardian, so free only when both are gone and all they ran with them."""

import fcntl
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tower.host import ProcessId, hostname, pid_space

_WEEK_S = 7 * 86_400

#: A file that is younger may be one that its worker is about to lock.
_NEW_S = 60.0
#: Files that were let go, which no other worker will ever lock: hundreds of them, left by towers whose databases are gone, cost nothing.
_let_go = set[Path]()

_log = logging.getLogger(__name__)


def folder(run_dir: Path | None) -> Path:
    """Return where the lock files of this user's workers are, by default below the system's temporary folder."""
    return run_dir or Path(tempfile.gettempdir()) / f"devops-control-tower-{os.getuid()}"


def make_own(where: Path) -> None:
    """Make the folder if need be; raise OSError if it cannot be, or is somebody else's, who could put anything there."""
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(where):
        raise PermissionError(f"{where} is not a folder of this user's")


def hold(where: Path, worker_id: str) -> int | None:
    """Lock the worker's file for as long as the returned descriptor is open anywhere; None, with a warning, if that is impossible."""
    try:
        make_own(where)
        _tidy(where)
        file = os.open(_path(where, worker_id), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        _log.warning("no lock file, so this worker's death may be noticed late: %s. Set TOWER_RUN_DIR to a folder of your own.", error)
        return None
    fcntl.flock(file, fcntl.LOCK_EX)  # a name that nobody else has: it waits for no one
    return file


def drop(where: Path, worker_id: str, file: int | None) -> None:
    """Remove the file of a worker that ends in order."""
    if file is not None:
        _path(where, worker_id).unlink(missing_ok=True)
        os.close(file)


def known(where: Path) -> dict[str, bool]:
    """Return the workers that have a file, and whether it is locked now; those that let it go long ago are left out."""
    try:
        return {path.stem: _is_held_still(where, path) for path in where.glob("*.lock") if path not in _let_go}
    except OSError:
        return {}


def _is_held_still(where: Path, path: Path) -> bool:
    is_held = _is_held(where, path.stem)
    if is_held is False:
        with suppress(FileNotFoundError):  # somebody has removed it just now
            if time.time() - path.stat().st_mtime > _NEW_S:
                _let_go.add(path)
    return bool(is_held)


def is_dead(where: Path, worker_id: str, process: ProcessId, host: str) -> bool:
    """Return True only if a worker and its guardian are surely gone.

    Where pids tell nothing, because its container was restarted, the lock does; a lock of another machine would prove nothing.
    """
    is_held = _is_held(where, worker_id)
    if process.space == pid_space():
        return process.is_dead() and not is_held
    return host == hostname() and is_held is False


def forget(where: Path, worker_id: str) -> None:
    """Remove the file of a dead worker."""
    if _is_held(where, worker_id) is False:
        _path(where, worker_id).unlink(missing_ok=True)


def _path(where: Path, worker_id: str) -> Path:
    return where / f"{worker_id}.lock"


def _is_ours(where: Path) -> bool:
    """Whether nobody but this user could have put a file there."""
    found = where.lstat()
    return where.is_dir() and not where.is_symlink() and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _is_held(where: Path, worker_id: str) -> bool | None:
    """Return whether the worker's file is locked; None if there is no such file, which proves nothing."""
    try:
        if not _is_ours(where):
            return None
        file = os.open(_path(where, worker_id), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two who look at once do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _tidy(where: Path) -> None:
    """Remove what was left by workers whose database nobody opened again."""
    for path in where.glob("*.lock"):
        if time.time() - path.stat().st_mtime > _WEEK_S:
            forget(where, path.stem)
