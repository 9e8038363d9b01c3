"""One run to a folder: a file `lock` that names the host and the process that write there.

Created with O_EXCL, which is atomic on local disks and on NFS since version 3. A lock whose owner
is gone is stale and taken over: its host is this one and its process has ended (the start time in
/proc tells it from a later process of the same number), or it was written by an earlier start of
this same Slurm job, which Slurm has ended before it requeued the job. Whoever takes a stale lock
over holds `flock` on it meanwhile, so that of two that try only one removes it.

The owner may still be ending, such as a worker that saves after its launcher was killed: so the
next start waits before it refuses. A lock that stays empty so long had an owner that died between
creating and writing it, and is stale too.

The owner of a lock that was taken over may live all the same, on a node that Slurm gave up without
reaching it. So a process asks before each save whether the lock still names it (`check_lock`), and
ends where it does not.

Left out: whether a process of another host lives; a lock taken over while its owner is writing, who
ends after that file; containers that share a host's name are one host.
"""

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError

LOCK_FILE = "lock"
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.5

_taken: dict[Path, "Owner"] = {}
"""Folders whose lock this process took, with what it wrote there."""

logger = logging.getLogger(__name__)


class TakenOver(UserError):
    """The run folder is another process's by now, which ends the whole run."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    process: int
    started: str
    """Start of the process in clock ticks since boot; empty where there is no /proc."""
    job: str
    """Slurm's job, empty outside."""
    restarts: int
    """How often Slurm has requeued it."""
    since: str

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        return cls(
            host=socket.gethostname(),
            process=os.getpid(),
            started=_start_of(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_gone(self, me: "Owner") -> bool:
        """Whether this owner has certainly ended."""
        if self.host == me.host and _start_of(self.process) != self.started:
            return True
        return bool(self.job) and self.job == me.job and self.restarts < me.restarts


def take_lock(folder: Path) -> Owner:
    """Makes this process the only one that writes into a run folder.

    Args:
        folder: It exists.

    Returns:
        What `release_lock` wants back.

    Raises:
        UserError: Another process has the lock and kept it for `WAIT_SECONDS`, or it has ended and
            its lock cannot be removed, such as one of another user.
    """
    path, me = folder / LOCK_FILE, Owner.me()
    deadline, is_said = time.monotonic() + WAIT_SECONDS, False
    while not _create(path, me):
        owner, is_over = _read(path), time.monotonic() >= deadline
        is_stale = is_over if owner is None else owner.is_gone(me)
        if is_stale and _remove_stale(path, owner):
            logger.warning("%s: its owner is gone (%s), taken over", path, _text(owner))
        elif is_over:
            held = f"has a lock of {_text(owner)}, which has ended, that cannot be removed"
            if not is_stale:
                held = f"is in use by {_text(owner)}; wait until it ends"
            raise UserError(
                f"--output_dir: {str(folder)!r} {held}; or set another --output_dir; if nothing "
                f"runs there, delete {path}"
            )
        elif not is_stale:
            if owner and not is_said:
                logger.warning(
                    "%s: held by %s; waiting %.0f s for it to end", path, _text(owner), WAIT_SECONDS
                )
                is_said = True
            time.sleep(POLL_SECONDS)
    _taken[folder] = me
    return me


def check_lock(path: Path) -> None:
    """Makes sure that a run folder is still this process's, before it writes there.

    Args:
        path: Anywhere; outside the folders whose lock this process took there is nothing to ask.

    Raises:
        TakenOver: The lock names another process, or is gone.
    """
    for folder, me in _taken.items():
        if not _lies_in(path, folder):
            continue
        lock = folder / LOCK_FILE
        found = "is gone, so another start may be at work there"
        with suppress(FileNotFoundError):
            owner = _parse(lock.read_text())
            if owner == me:
                continue
            found = f"names {_text(owner)}, which took this run over"
        raise TakenOver(
            f"--output_dir: {lock} {found}; this start ends here and saves nothing more; if no run "
            "is at work there, the same command goes on from the last checkpoint"
        )


def _lies_in(path: Path, folder: Path) -> bool:
    """By name or in truth: a run folder, and a stage's in it, may be links to other disks."""
    by_name = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    return by_name or path.resolve().is_relative_to(folder.resolve())


def is_taken_over(path: Path) -> bool:
    """Whether `check_lock` would end this process."""
    try:
        check_lock(path)
    except (TakenOver, OSError):
        return True
    return False


def release_lock(folder: Path, me: Owner) -> None:
    """Gives the lock back, unless it is another's by now."""
    _taken.pop(folder, None)
    path = folder / LOCK_FILE
    if _read(path) == me:
        path.unlink(missing_ok=True)


def _create(path: Path, me: Owner) -> bool:
    """Writes the lock where there is none."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(me)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> Owner | None:
    """The owner of a lock; None where it is gone, or not written yet."""
    try:
        return _parse(path.read_text())
    except OSError:
        return None


def _parse(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _remove_stale(path: Path, owner: Owner | None) -> bool:
    """Removes a lock unless it is another one by now. Whether this process did."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_same = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            if not is_same or _read(path) != owner:
                return False
            path.unlink()
            return True
    except OSError:  # removed, or just being removed, by another
        time.sleep(POLL_SECONDS)
        return False


def _start_of(process: int) -> str | None:
    """Start time of a process that runs, empty where there is no /proc; None where it has ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self").exists() else ""
    return None if fields[0] in "ZX" else fields[19]


def _text(owner: Owner | None) -> str:
    if owner is None:
        return "a process that has not said its name"
    return f"process {owner.process} on {owner.host} since {owner.since}"
