"""Stopping on a signal: a request is noted at once, and obeyed where nothing is lost.

SIGTERM, SIGUSR1, Ctrl-C, and the death of the launcher ask the run to stop; it ends with status 75,
and the same command goes on. A process that acts alone, as in prune, evaluate, sweep and while it
samples the teacher, stops at once by an exception: what these write is whole or not there. While a
student trains (`held`), and wherever ranks act together, the request waits until all of them have
agreed on a step and saved (`training/step_agreement.py`).

A second request changes nothing, so that it cannot cut short what the first one began; a second
Ctrl-C ends the process. Knows the standard library alone, because it listens before torch loads.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 75
"""Exit status of a run that was stopped: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
WATCH_SECONDS = 1.0


class Stopped(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt not an error that code may count as one."""


class _Process:
    """What this process was asked, and whether it may stop where it is."""

    requested: str | None = None
    held = 0
    is_alone = True


_process = _Process()


def requested() -> str | None:
    """The name of the first signal that asked for an end, or None."""
    return _process.requested


@contextmanager
def listening() -> Iterator[None]:
    """Hears the signals inside the block; a process started by a launcher misses it too."""
    _process.requested, _process.held, _process.is_alone = None, 0, True
    numbers = [n for n in SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, _hear) for number in numbers}
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Lets requests wait inside the block; the caller looks at `requested` itself."""
    _process.held += 1
    try:
        yield
    finally:
        _process.held -= 1


@contextmanager
def acting(*, alone: bool) -> Iterator[None]:
    """Says whether other ranks wait for this one's next step (False) or its result (True).

    Raises:
        Stopped: The process acts alone, and was asked before.
    """
    before, _process.is_alone = _process.is_alone, alone
    try:
        if _process.requested and _may_stop():
            raise Stopped(_process.requested)
        yield
    finally:
        _process.is_alone = before


def _may_stop() -> bool:
    return _process.is_alone and _process.held == 0


def _hear(number: int, frame: object) -> None:
    if _process.requested is not None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return
    _process.requested = signal.Signals(number).name
    if _may_stop():
        raise Stopped(_process.requested)


def _watch(launcher: int) -> None:
    """Asks for an end when the process that started this one is gone."""
    while os.getppid() == launcher:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
