"""A function in a process of its own: what goes through, what ends it, and what it leaves behind.

Times are asserted by the clock, generously: a busy machine stretches processor time.
"""

import gc
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from rewards.time_limit import CLOCK_FACTOR, TimeLimited

SECONDS = 0.3
BY_THE_CLOCK = CLOCK_FACTOR * SECONDS + 1
FUNCTIONS = """
import json, os, re, signal, sys, time

calls = 0
loaded = False

def act(name, text=""):
    return globals()[name](text)

def code_points(text):
    return sum(map(ord, text)) + len(text)

def count(text):
    global calls
    calls += 1
    return calls

def keeper(text):
    return os.getppid()

def worker(text):
    return os.getpid()

def power(text):
    return 3 ** 3 ** 20

def backtrack(text):
    return re.search("(a+)+b", "a" * 60)

def sleep(text):
    time.sleep(600)

def stubborn(text):
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    time.sleep(600)

def raises(text):
    raise ValueError("\\x1b[2J")

def quits(text):
    sys.exit(0)

def dies(text):
    os.kill(os.getpid(), signal.SIGSEGV)

def leaves(text):
    os._exit(3)

def no_number(text):
    return "one"

def hungry(text):
    return len(bytearray(3 << 30))

def grows(text):
    held = bytearray(1100 << 20)
    held[::4096] = b"1" * len(held[::4096])
    return os.getpid()

def reads(text):
    return len(sys.stdin.read())

def prints(text):
    print(json.dumps({"number": 1, "value": 5}))
    return 2

def slow_at_first(text):
    global loaded
    end = time.process_time() + (0 if loaded else 0.5)
    while time.process_time() < end:
        pass
    loaded = True
    return 1
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "limited_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def act(functions):
    return TimeLimited("limited_functions:act", SECONDS)


def kill(*pids):
    assert min(pids) > 1, "0 and 1 are more than one process"
    for pid in map(int, pids):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)


def is_running(pid):
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip() != "" and not done.stdout.startswith("Z")


def ends_within(seconds, *pids):
    end = time.monotonic() + seconds
    while any(map(is_running, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    "text",
    ["", "1\n2\r\n", "\x00\x1b[2J", "\ud800\udfff", "٤२𝟏", "\\u0000{}[]\"'", "9" * 1_000_000],
)
def test_texts_arrive_as_they_are(act, text):
    assert act("code_points", text) == sum(map(ord, text)) + len(text)
    assert (act.timeouts, act.failures) == (0, 0)


def test_one_process_answers_many_calls(act):
    assert [act("count") for _ in range(3)] == [1, 2, 3]
    assert act("keeper") != os.getpid()


@pytest.mark.parametrize("hang", ["power", "backtrack", "sleep"])
def test_the_limit_ends_what_hangs_and_only_the_worker(act, hang):
    keeper, worker = act("keeper"), act("worker")
    start = time.monotonic()
    assert act(hang) == 0.0
    assert time.monotonic() - start < BY_THE_CLOCK + 60
    assert (act.timeouts, act.failures) == (1, 0)
    assert act("code_points", "a") == 98
    assert act("keeper") == keeper
    assert act("worker") != worker
    assert not is_running(int(worker))


def test_the_limit_is_in_processor_time(functions):
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    act, before = TimeLimited("limited_functions:act", SECONDS), spent()
    assert (act("power"), act.timeouts) == (0.0, 1)
    del act
    gc.collect()
    assert spent() - before < SECONDS + 0.5  # the start of the interpreter is in it


def test_a_function_that_stops_the_timers_is_ended_by_the_caller(act):
    keeper, worker = act("keeper"), act("worker")
    assert act("stubborn") == 0.0
    assert act.timeouts == 1
    assert act("keeper") != keeper
    assert ends_within(5, int(keeper), int(worker))


@pytest.mark.parametrize(
    "fault", ["raises", "quits", "dies", "leaves", "no_number", "hungry", "absent"]
)
def test_a_fault_counts_as_zero_and_the_next_call_is_answered(act, fault, caplog):
    assert act(fault) == 0.0
    assert (act.timeouts, act.failures) == (0, 1)
    assert act("code_points", "a") == 98
    assert "limited_functions:act" in caplog.text
    assert "\x1b" not in caplog.text


def test_killed_processes_are_replaced(act):
    kill(act("keeper"), act("worker"))
    assert act("code_points", "a") == 98
    assert act.failures == 0


def test_a_worker_killed_between_two_calls_spoils_no_answer(act):
    keeper = act("keeper")
    for _ in range(2):
        kill(act("worker"))
    assert [act("code_points", "a" * k) for k in range(5)] == [0, 98, 196, 294, 392]
    assert act("keeper") == keeper
    assert (act.timeouts, act.failures) == (0, 0)


def test_an_interrupted_call_spoils_no_answer(act):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    act("code_points")
    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            act("sleep")
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert [act("code_points", "a" * k) for k in range(5)] == [0, 98, 196, 294, 392]


def test_a_worker_that_held_much_memory_makes_room(functions):
    act = TimeLimited("limited_functions:act", seconds=30.0)
    grown, keeper = act("grows"), act("keeper")
    assert grown > 1
    assert act("worker") != grown
    assert act("worker") == act("worker")
    assert act("keeper") == keeper
    assert (act.timeouts, act.failures) == (0, 0)


def test_printing_and_reading_do_not_touch_the_answers(act):
    assert act("prints") == 2
    assert act("reads") == 0
    assert act("prints") == 2
    assert (act.timeouts, act.failures) == (0, 0)


def test_the_log_thins_out(act, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            act("raises")
    assert [record.message.split("(")[-1] for record in caplog.records] == [
        f"{count} so far)" for count in (1, 2, 4, 8)
    ]
    assert act.failures == 9


def test_warming_up_is_not_timed(functions):
    cold = TimeLimited("limited_functions:slow_at_first", SECONDS)
    warm = TimeLimited("limited_functions:slow_at_first", SECONDS, warm_up=("",))
    assert (cold(""), cold.timeouts) == (0.0, 1)
    assert (warm(""), warm.timeouts) == (1.0, 0)


@pytest.mark.parametrize("path", ["limited_functions:absnt", "no_such_module:fn"])
def test_what_does_not_load_is_an_error(functions, path):
    with pytest.raises(RuntimeError, match=r"does not start in its own process: '"):
        TimeLimited(path)("")


def test_the_limit_holds_in_other_threads_and_each_gets_its_own_answer(act):
    answers = {}

    def run(name):
        answers[name] = [act("power")] + [act("code_points", name * k) for k in range(20)]

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert act.timeouts == 3
    for name, got in answers.items():
        assert got == [0.0] + [(ord(name) + 1) * k for k in range(20)]


class Verified(Dataset):
    """What a worker of a DataLoader would do: verify its item."""

    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 4

    def __getitem__(self, index):
        hang = self.function("power") if index == 1 else 0.0
        return [self.function("code_points", "a" * index), hang, self.function("keeper")]


def test_the_limit_holds_in_a_daemonic_worker_process(act):
    own = act("keeper")
    loader = DataLoader(
        Verified(act), num_workers=1, batch_size=None, multiprocessing_context="fork"
    )
    values, hangs, keepers = zip(*loader, strict=True)
    assert values == (0, 98, 196, 294)
    assert hangs == (0.0,) * 4
    assert len({own, *keepers}) == 2
    assert act("keeper") == own
    assert ends_within(5, *map(int, keepers))


def test_a_fork_does_not_inherit_a_lock_that_is_held(act):
    act("code_points")
    thread = threading.Thread(target=act, args=("sleep",))
    thread.start()
    time.sleep(SECONDS)
    assert thread.is_alive()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(int(act("code_points", "a"))), daemon=True
    )
    process.start()
    process.join(timeout=10)
    assert process.exitcode == 98
    thread.join()


def test_pickling_takes_the_function_and_leaves_the_process(act):
    act("raises")
    keeper = act("keeper")
    copy = pickle.loads(pickle.dumps(act))
    assert (copy.path, copy.seconds, copy.failures) == (act.path, act.seconds, 0)
    assert copy("code_points", "a") == 98
    assert copy("keeper") != keeper


def test_nothing_stays_when_the_function_goes(functions):
    act = TimeLimited("limited_functions:act")
    keeper, worker = act("keeper"), act("worker")
    del act
    gc.collect()
    assert ends_within(5, int(keeper), int(worker))


@pytest.mark.parametrize("last", ["pass", "act('power')", "act('sleep')"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays_when_the_caller_is_killed(functions, last, end):
    code = (
        "import signal, time; from rewards.time_limit import TimeLimited\n"
        # a shell that starts the tests in the background makes them ignore the signal
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"act = TimeLimited('limited_functions:act', {SECONDS})\n"
        "print(int(act('keeper')), int(act('worker')), flush=True)\n"
        f"{last}\ntime.sleep(600)"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{functions}{os.pathsep}{root}"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as caller:
        pids = list(map(int, caller.stdout.readline().split()))
        time.sleep(0.1)
        caller.send_signal(end)
        try:
            caller.wait(timeout=60)
        finally:
            caller.kill()
        assert len(pids) == 2
        assert ends_within(BY_THE_CLOCK + 5, *pids)
