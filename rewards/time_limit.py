"""A time limit that holds: a function of texts answers from a process of its own.

A completion is hostile text. It can make sympy compute one integer power, or a regular expression
backtrack, for hours inside C code, where Python runs no signal handler and no other thread. The
operating system can still end the process that does it, so the function runs in one:

    caller  <- JSON lines ->  keeper  <- fork ->  worker

The keeper is a new interpreter that imports the function once. It forks the worker, which answers.
Timers of the kernel that no handler catches end a worker whose time is over; the keeper tells the
caller and forks the next one, which takes milliseconds where importing sympy anew takes a second.

`seconds` is processor time, so that a busy machine changes no reward. A function that sleeps has
`CLOCK_FACTOR` times as long by the clock. The caller waits a second longer and then ends both
processes, for functions that set the kernel's timers themselves.

It works in any thread, in daemonic worker processes, after a fork and after pickling: each process
starts a keeper of its own at its first call. Keeper and worker end when the socket to the caller
closes. Only text goes in and only a number comes out, as JSON.

Left out: systems without `fork`; modules that start threads or CUDA when they are imported, which
a fork does not survive; a sandbox, because what the function itself does is not held back.
"""

import json
import logging
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedReader

from rewards.dotted import load_function

TIME_LIMIT_SECONDS = 2.0
"""Default limit for one completion, in processor seconds."""

CLOCK_FACTOR = 5
"""Seconds by the clock for each second of processor time."""

START_SECONDS = 120
"""How long the keeper may take to import the function."""

MEMORY_BYTES = 2 << 30
"""Data a worker may hold. One that has held half of it makes room for a fresh one after its answer,
so that what a completion left behind cannot fail the next ones."""

RETIRED = 17
"""Exit status of such a worker."""

MAX_REPLY_BYTES = 1 << 16

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rewards.time_limit import serve; serve()"
)

logger = logging.getLogger(__name__)


class TimeLimited:
    """A function (text, ...) -> float that gives 0.0 where it takes too long or fails.

    Can be pickled; the counters start anew then. Calls of several threads take turns.
    """

    def __init__(self, path: str, seconds: float = TIME_LIMIT_SECONDS, warm_up: Sequence[str] = ()):
        """Name the function; its process starts at the first call.

        Args:
            path: `my.module:fn`.
            seconds: Processor time of one call, > 0.
            warm_up: Arguments of a first call that is not timed, for a function that loads what it
                needs when it is called; empty makes none.
        """
        self.path, self.seconds, self.warm_up = path, seconds, tuple(warm_up)
        self.timeouts = 0
        """Calls that took too long."""
        self.failures = 0
        """Calls that raised, or whose process died."""
        self._forget()
        _INSTANCES.add(self)

    def __reduce__(self):
        """Pickle what the function is, not its process."""
        return TimeLimited, (self.path, self.seconds, self.warm_up)

    def __call__(self, *arguments: str) -> float:
        """Call the function.

        Returns:
            Its value; 0.0 past the limit and on any failure, both counted and logged.

        Raises:
            RuntimeError: The function cannot be loaded in its process.
        """
        with self._lock:
            reply = self._ask(arguments)
            if reply.get("timeout"):
                self.timeouts += 1
                _log(self.timeouts, f"{self.path}: counts as 0 after {self.seconds:g} s")
            elif "error" in reply:
                self.failures += 1
                _log(self.failures, f"{self.path}: counts as 0 because of {reply['error']}")
        return float(reply.get("value", 0.0))

    def _forget(self) -> None:
        self._lock, self._keeper = threading.Lock(), None

    def _ask(self, arguments: Sequence[str]) -> dict:
        if self._keeper is None or not self._keeper.is_alive():
            self._keeper = _Keeper(self.path, self.seconds, self.warm_up)
        try:
            return self._keeper.ask(arguments, CLOCK_FACTOR * self.seconds + 1)
        except BaseException as error:
            self._keeper.stop()
            self._keeper = None
            if isinstance(error, TimeoutError):
                return {"timeout": True}
            if isinstance(error, (OSError, ValueError)):
                return {"error": f"{type(error).__name__}: {error}"}
            raise


def _after_fork() -> None:
    """In the new process: keepers, and locks that another thread held, stay with the old one."""
    for function in list(_INSTANCES):
        function._forget()


_INSTANCES: weakref.WeakSet[TimeLimited] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)


def _log(count: int, message: str) -> None:
    """Log the 1st, 2nd, 4th, 8th ... time."""
    if count & (count - 1) == 0:
        logger.warning("%s (%d so far)", message, count)


class _Keeper:
    """The caller's end: a running keeper, and one question at a time."""

    def __init__(self, path: str, seconds: float, warm_up: Sequence[str]):
        self._socket, theirs = socket.socketpair()
        self._rest, self._number = b"", 0
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, json.dumps([str(entry) for entry in sys.path])],
                stdin=theirs,
                start_new_session=True,
            )
        self.stop = weakref.finalize(self, _end, self._process, self._socket, os.getpid())
        try:
            reply = self._exchange([path, seconds, warm_up], START_SECONDS)
        except (OSError, ValueError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        if "error" in reply:
            self.stop()
            raise RuntimeError(f"{path!r} does not start in its own process: {reply['error']}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, arguments: Sequence[str], wait_seconds: float) -> dict:
        """Have the function called.

        Returns:
            `value`, or `error` and perhaps `timeout`.

        Raises:
            TimeoutError: There is no answer yet.
            OSError, ValueError: The keeper is gone or talks nonsense.
        """
        self._number += 1
        return self._exchange([self._number, *arguments], wait_seconds)

    def _exchange(self, message: list, wait_seconds: float) -> dict:
        deadline = time.monotonic() + wait_seconds
        self._socket.settimeout(wait_seconds)
        self._socket.sendall(_encode(message))
        while (reply := self._read_line(deadline)).get("number") != self._number:
            pass  # the end of a worker that had answered already
        return reply

    def _read_line(self, deadline: float) -> dict:
        while b"\n" not in self._rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            read = self._socket.recv(MAX_REPLY_BYTES)
            if not read or len(self._rest) > MAX_REPLY_BYTES:
                raise ConnectionError("its process has ended")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return _decode(line)


def _end(process: subprocess.Popen, connection: socket.socket, owner: int) -> None:
    """End keeper and worker; in a fork of the caller only this end of the socket."""
    connection.close()
    if owner != os.getpid():
        process.returncode = 0  # the owner waits for it
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve() -> None:
    """The keeper: load the function that the first line names, keep one worker, until the end.

    A signal to the whole job is for the caller, who ends this; an answer must not count as wrong
    because of it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)
    requests = connection.makefile("rb")
    path, seconds, warm_up = _decode(requests.readline())
    try:
        function = load_function(path)
    except ValueError as error:
        _send(connection, {"number": 0, "error": str(error)})
        return
    if warm_up:
        with suppress(Exception):
            function(*warm_up)
    _limit(resource.RLIMIT_DATA, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    current = mmap.mmap(-1, 8)
    _send(connection, {"number": 0})
    with suppress(OSError):
        while code := _run_worker(function, seconds, requests, connection, current):
            reply = {
                "number": int.from_bytes(current[:], "little"),
                "timeout": -code in (signal.SIGPROF, signal.SIGALRM),
                "error": f"its process, which ended with {code}",
            }
            if code != RETIRED:
                _send(connection, reply)


def _run_worker(
    function: Callable[..., float],
    seconds: float,
    requests: BufferedReader,
    connection: socket.socket,
    current: mmap.mmap,
) -> int:
    """Fork a worker and wait for it: 0 when the caller has gone, else its status or -signal."""
    worker = os.fork()
    if worker:
        return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    try:
        for line in requests:
            number, *arguments = _decode(line)
            current[:] = number.to_bytes(8, "little")
            _set_timers(seconds)
            reply = _call(function, arguments)
            _set_timers(0)
            _send(connection, {"number": number, **reply})
            if _peak_bytes() > MEMORY_BYTES // 2:
                os._exit(RETIRED)
        os._exit(0)
    except BaseException:
        os._exit(1)


def _call(function: Callable[..., float], arguments: list[str]) -> dict:
    try:
        return {"value": float(function(*arguments))}
    except BaseException as error:
        return {"error": ascii(f"{type(error).__name__}: {error}")[1:300]}


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _set_timers(seconds: float) -> None:
    """Let the kernel end this process when the time is over; 0 takes that back."""
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_FACTOR * seconds)


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(_encode(message))


def _encode(message: list | dict) -> bytes:
    """One line, in which every text stays as it is, single surrogates too."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _decode(line: bytes) -> list | dict:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _limit(kind: int, value: int) -> None:
    """Lower a resource limit of this process and its children."""
    _, hard = resource.getrlimit(kind)
    lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(OSError, ValueError):  # where the system has no such limit
        resource.setrlimit(kind, (lower, hard))
