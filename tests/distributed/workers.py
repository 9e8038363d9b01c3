"""Real ranks for tests: processes that join one gloo group once and then run one job after another.

Starting a rank and importing DeepSpeed takes about ten seconds, so a pool of each world size stays
alive for the whole session. A job is a module-level function `f(rank, world_size, *args)` in a
module that the ranks can import; what it returns comes back from every rank.
"""

import gc
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import distributed as dist
from torch import multiprocessing

JOB_SECONDS = 600.0  # the first job on a machine may compile DeepSpeed's CPU Adam for minutes
GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
SEED = 0

_pools: dict[int, "RankPool"] = {}


class RankError(AssertionError):
    """A job raised on some rank; the message holds every rank's traceback."""


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs a job on every rank of a pool that stays alive.

    Args:
        world_size: Ranks; the pool is started at the first call.
        function: `function(rank, world_size, *args)`, at the top level of a module.
        *args: Picklable.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankError: A rank raised, died or did not answer. The pool starts anew at the next call.
    """
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    try:
        return _pools[world_size].run(function, *args)
    except BaseException:
        _pools.pop(world_size).close()
        raise


def close_pools() -> None:
    """Ends every rank."""
    while _pools:
        _pools.popitem()[1].close()


class RankPool:
    """Ranks of one world size, each at the other end of a pipe."""

    def __init__(self, world_size: int):
        """Starts the ranks; they join their group on their own."""
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        rendezvous = f"file://{self.folder.name}/rendezvous"
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world_size, rendezvous, theirs, self._log(rank)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """See `run_on_ranks`."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + JOB_SECONDS
        while len(answers) < len(self.pipes):
            open_pipes = [pipe for r, pipe in enumerate(self.pipes) if r not in answers]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, f"died\n{self._log(rank).read_text()[-2000:]}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        self._raise_failures(answers)
        return [answers[rank][1] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """Ends the ranks, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def _log(self, rank: int) -> Path:
        return Path(self.folder.name) / f"rank-{rank}.log"

    def _raise_failures(self, answers: dict[int, tuple[bool, Any]]) -> None:
        faults = [
            f"rank {rank}: {answers[rank][1] if rank in answers else 'no answer'}"
            for rank in range(len(self.pipes))
            if not answers.get(rank, (False,))[0]
        ]
        if faults:
            raise RankError("\n".join(faults))


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Any, log: Path) -> None:
    """One rank's life: join, then do jobs until the pipe closes. What it prints goes to a file."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(SEED)
        try:
            answer = (True, function(rank, world_size, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        del answer
        gc.collect()
