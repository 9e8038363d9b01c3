"""Signals: obeyed at once where a process acts alone, else noted until all have saved."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from pipeline.config import Config
from pipeline.stages.training import train
from pipeline.stopping import Stopped, acting, held, listening, requested
from pipeline.training.checkpoint import newest_whole_checkpoint
from tests.unit.test_training import distill_trainer, sparsity_of, tokenizer  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background jobs ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def listens():
    with listening():
        yield


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_alone_it_stops_at_once_and_no_except_exception_swallows_it(number):
    with listening():
        with pytest.raises(Stopped, match=signal.Signals(number).name):
            swallowing(number)
        assert requested() == signal.Signals(number).name


def swallowing(number):
    try:
        send(number)
    except Exception:
        return


def test_handlers_of_before_are_back_after_it():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert before == after


def test_a_held_request_waits_and_later_ones_change_nothing(listens):
    with held():
        send(signal.SIGUSR1)
        send()
        send()
        assert requested() == "SIGUSR1"
    send()
    assert requested() == "SIGUSR1"


def test_a_second_interrupt_ends_the_process(listens):
    with held():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_rank_that_others_wait_for_stops_when_it_next_acts_alone(listens):
    with acting(alone=False):
        send()
        with held(), acting(alone=True):
            pass
        with pytest.raises(Stopped), acting(alone=True):
            pass


class SendAt(TrainerCallback):
    """Signals to this process in the middle of a step."""

    def __init__(self, step, numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                send(number)


def run_stage(tokenizer, tmp_path, name, *callbacks):  # noqa: F811
    """A distill stage of 5 steps, as the pipeline runs it."""
    trainer = distill_trainer(tokenizer, tmp_path / name / "distill", 5)
    trainer.args.save_steps = 100
    sparsity = sparsity_of(trainer.model, tmp_path / "prune", end_step=4)
    for callback in callbacks:
        trainer.add_callback(callback(trainer) if isinstance(callback, type) else callback)
    out = tmp_path / name / "distill"
    train(Config(), None, trainer, sparsity, out, None)
    return trainer


class SignalWhileSaving(TrainerCallback):
    """A second signal while the checkpoint is written that the first one asked for."""

    def __init__(self, trainer):
        put = trainer._save_rng_state

        def spy(*args):
            send(signal.SIGUSR1)
            put(*args)

        trainer._save_rng_state = spy


def test_training_finishes_its_step_saves_and_goes_on_bit_for_bit(tokenizer, tmp_path, listens):  # noqa: F811
    straight = run_stage(tokenizer, tmp_path, "straight")
    for step in (1, 3, 5):
        name = f"stopped-{step}"
        signals = SendAt(step, (signal.SIGTERM, signal.SIGUSR1))
        with listening(), pytest.raises(Stopped, match="SIGTERM"):
            run_stage(tokenizer, tmp_path, name, signals, SignalWhileSaving)
        out = tmp_path / name / "distill"
        assert newest_whole_checkpoint(out).name == f"checkpoint-{step}"
        assert not (out / "model").exists()
        with listening():
            resumed = run_stage(tokenizer, tmp_path, name)
        for key, weight in straight.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[key]), (step, key)
        assert (out / "model").exists()


WORKER = """
import time
from pipeline.stopping import Stopped, listening
try:
    with listening():
        print("listens", flush=True)
        time.sleep(60)
except Stopped as stop:
    print("stopped by", stop, flush=True)
"""
LAUNCHER = """
import os, subprocess, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "1"
subprocess.Popen([sys.executable, "-c", {worker!r}])
time.sleep(60)
"""


def test_a_worker_whose_launcher_is_gone_stops():
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LAUNCHER).format(worker=WORKER)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "listens\n"
    launcher.kill()
    assert launcher.stdout.readline() == "stopped by SIGTERM\n"
    launcher.wait()
    launcher.stdout.close()
