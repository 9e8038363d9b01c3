"""One run on many ranks: what rank 0 does alone, and how the others wait for it.

Pruning, sampling the teacher and evaluating run on rank 0; distill, on_policy and grpo on every
rank. The launcher (`accelerate launch`) sets the ranks.
"""

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from pipeline.errors import UserError
from pipeline.stopping import Stopped, acting, requested

LONGEST_WAIT = timedelta(days=30)
"""A stage on rank 0 may take hours; the libraries' limits are for collectives of seconds."""

Result = TypeVar("Result")


def is_main() -> bool:
    """Whether this is rank 0, which alone writes records, reports and messages."""
    return os.environ.get("RANK", "0") == "0"


def is_local_main() -> bool:
    """Whether this is the first rank of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def rank() -> int:
    """The number of this rank, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many ranks the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Makes sure that the ranks can talk, also in a run that trains nothing."""
    if world_size() > 1:
        PartialState(cpu=not torch.accelerator.is_available())


def on_main(function: Callable[[], Result]) -> Result:
    """Runs a function on rank 0 and gives its result to every rank, all of which must call.

    Args:
        function: Its result is broadcast, so it is small and can be pickled.

    Raises:
        UserError: On every rank, when rank 0 raised it. Anything else ends rank 0, and the launcher
            ends the others.
        Stopped: Likewise.
    """
    if world_size() == 1:
        return function()
    outcome: list = [None, None, None]
    if is_main():
        try:
            with acting(alone=True):
                outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
        except Stopped as stop:
            outcome[2] = str(stop)
    dist.broadcast_object_list(outcome, src=0, group=_waiting_group())
    result, message, stopped = outcome
    if message is not None:
        raise UserError(message)
    if stopped is not None:
        raise Stopped(stopped)
    return result


def stop_together() -> None:
    """Stops every rank when one was asked to, and all may. Every rank calls it.

    Raises:
        Stopped: One was.
    """
    if any_rank(requested() is not None)[0]:
        raise Stopped(requested() or "another rank")


def raise_together(error: Exception | None) -> None:
    """Ends all ranks with the first rank's error when any has one. Every rank calls it.

    Raises:
        UserError: On every rank, with the message of the lowest rank that has an error.
    """
    messages = [text for text in gather_from_all(error and str(error)) if text is not None]
    if messages:
        raise UserError(messages[0]) from error


def gather_from_all(value: Result) -> list[Result]:
    """Every rank's small value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=_waiting_group())
    return values


def any_rank(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set on any rank. Every rank calls it; cheap enough a step."""
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, group=_waiting_group())
    return [bool(count) for count in counts]


def wait_for_all() -> None:
    """Returns when every rank has called it."""
    if world_size() > 1:
        dist.barrier(group=_waiting_group())


@functools.cache
def _waiting_group() -> dist.ProcessGroup:
    """All ranks, over gloo, with a patience the default group does not have."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
