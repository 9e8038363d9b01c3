"""What a stage costs is said once, after ten steps of this process."""

import logging
from types import SimpleNamespace

import pytest

from pipeline.training import pace
from pipeline.training.pace import Pace, duration


def steps(callback, clock, number, first_step=0, max_steps=100, tokens=50):
    """Lets a stage take steps of 2 seconds, the first of 30."""
    for step in range(1, number + 1):
        clock.now += 30 if step == 1 else 2
        state = SimpleNamespace(
            global_step=first_step + step,
            max_steps=max_steps,
            num_input_tokens_seen=tokens * (first_step + step),
        )
        callback.on_step_end(None, state, None)


@pytest.fixture
def clock(monkeypatch):
    time = SimpleNamespace(now=5.0)
    monkeypatch.setattr(pace.time, "monotonic", lambda: time.now)
    return time


def test_time_left_hours_and_tokens(clock, caplog):
    caplog.set_level(logging.INFO)
    callback = Pace("grpo", num_ranks=4)
    steps(callback, clock, 9)
    assert caplog.messages == []
    callback = Pace("grpo", num_ranks=4)
    steps(callback, clock, 25, first_step=40)
    (message,) = caplog.messages  # once, and the slow first step is not in it
    assert message.startswith("grpo: 2 s a step, 2 min left, ")  # 50 steps of 2 s
    assert "0.222 " in message  # 4 ranks x 2 s x 100 steps
    assert "25 tokens a second" in message


def test_without_a_count_of_tokens(clock, caplog):
    caplog.set_level(logging.INFO)
    steps(Pace("distill", num_ranks=1), clock, 10, tokens=0)
    assert "tokens" not in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12600, "3.5 h"), (89.9, "90 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
