"""Seconds of several sides of a comparison, measured in turn on one machine.

Each round times every side once, so a machine that slows down slows all of them, and a ratio is
taken within a round. What is reported are medians with quartiles.

With one thread on a CPU the time is the processor's: other processes then cost what they take from
caches and memory, and not the slices in which they run.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_SECONDS = 0.05
"""A sample repeats what is shorter."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    run: Callable[[], object]
    """What is timed."""
    prepare: Callable[[], object] = lambda: None
    """What goes before every sample, untimed."""
    once: bool = False
    """`run` needs `prepare` before every call, so a sample is one call."""


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, the work it leaves on the device included."""
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        function()
        return clock() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000.0


def alternate(
    sides: dict[str, Side], device: torch.device, num_rounds: int
) -> dict[str, list[float]]:
    """Times every side once a round, after one round that is not counted.

    Args:
        sides: Name to side.
        device: Where they work.
        num_rounds: Samples of each, at least 2.

    Returns:
        Name to seconds of one call, round by round.
    """
    repeats = {}
    for name, side in sides.items():
        side.prepare()
        side.run()
        side.prepare()
        repeats[name] = 1 if side.once else _repeats(seconds(side.run, device))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            side.prepare()
            if not side.once:
                side.run()
            found[name].append(_sample(side.run, repeats[name], device))
    return found


def _repeats(taken: float) -> int:
    return max(1, math.ceil(MIN_SECONDS / max(taken, 1e-6)))


def _sample(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    def calls() -> None:
        for _ in range(repeats):
            run()

    return seconds(calls, device) / repeats


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartiles": [lower, upper]}


def ratios(values: list[float], reference: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratio within each round."""
    return summary([a / b for a, b in zip(values, reference, strict=True)])
