"""What every test gets: one torch thread, no network or Hub, its own log, and no unnoticed skip.

With `REQUIRE_ALL=1`, as in `.ci/run`, a skipped test or test file counts as failed; only a test
marked `gpu` may skip, because no command can install a GPU.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator

import pytest
import torch

_HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {  # before anything of Hugging Face is imported; child processes inherit it
    "HF_HOME": _HF_HOME.name,
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "TOKENIZERS_PARALLELISM": "false",
}

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses connections that leave this machine."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(autouse=True)
def log_handlers_end_with_their_test() -> Iterator[None]:
    """Removes what a run in this process attached to the root logger.

    Its stream is the terminal that pytest made for one test and closes after it. Libraries reach
    the root logger too: transformers, where the environment says `CI=true`.
    """
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Turns the skip of a test into a failure."""
    report = yield
    if REQUIRE_ALL and report.skipped and not item.get_closest_marker("gpu"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Turns the skip of a whole file into a failure."""
    report = yield
    if REQUIRE_ALL and report.skipped:
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Keeps the skip's reason. An expected failure (`xfail`) counts too: it checks nothing."""
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"REQUIRE_ALL=1 allows no skip: {reason or report.wasxfail}"
