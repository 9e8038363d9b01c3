"""Search for the sparsity of every matrix, by the KL of the whole model to the dense one.

That rates can be searched is the idea of Self-Pruner (arXiv 2502.14413), where a language model
proposes them. The search is EvoPress-style (arXiv 2410.14649), evolution over a database:

1. Database. One calibration pass over the dense model prunes every matrix at all its levels
   (`allocation_levels.py`).
2. Fitness. A candidate, one level per matrix, is stitched together from the database; its KL to the
   dense model, in nats per scored token, is taken on the calibration rows (`dense_kl.py`).
3. Generation. The parent's mutants go through successive selection, on rows drawn anew: all on
   1/32 of them, the best on more and more, one on all. The parent, measured on all rows, competes
   in each step, and is only replaced by a candidate with a lower KL on all rows. A generation costs
   about four evaluations.

The first parent is uniform, so the result is never worse than uniform on these rows, as stitched.
The database has seen dense inputs and the pruning that follows sees pruned ones: which candidate is
better carries over, their KL does not.

Assumed, for want of the paper's text: all constants, a single parent, the steps of selection. Left
out: levels around OWL's rates, one rate per layer, pruning anew for each candidate.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.pruning.allocation_levels import Candidate, LevelSpace
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.calibration import PROGRESS_DELAY_SECONDS, calibrate
from pipeline.pruning.dense_kl import DenseKl
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.matrix_pruner import MatrixPruner
from pipeline.pruning.redistribution import balanced_bias

NUM_MUTANTS = 64
"""Mutants of a generation; fewer with few rows, and where the budget ends."""
SELECTION = ((1 / 32, 8), (1 / 8, 2), (1 / 2, 1), (1, 1))
"""Steps of successive selection: share of the rows seen so far, and how many candidates stay."""
MAX_DRAWS = 100
"""Draws of a mutant before the neighbourhood counts as searched."""


@dataclass(frozen=True)
class SearchResult:
    """What the search found, and how it got there."""

    rates: dict[str, float]
    """Weight name to sparsity in [0, 1), in model order. The mean over weights is the target."""
    kl_uniform: float
    """Of the stitched uniform candidate, nats per scored token; inf where it is not finite."""
    kl_best: list[float]
    """Of the parent after each generation. Never rises, never above `kl_uniform`."""
    num_evaluations: float
    """Evaluations used, in passes over all scored rows."""


@torch.no_grad()
def search_rates(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    pruner: MatrixPruner,
    sparsity: float,
    *,
    num_evaluations: int,
    seed: int,
    progress: str | None = None,
) -> SearchResult:
    """Searches the rates at which `pruner` does the least harm.

    The model is used to run the candidates. Its weights are as they were afterwards, bit by bit,
    also after an exception. Memory on the CPU: the prunable weights once per level and once dense,
    9 times in the model's dtype; scored tokens x hidden size. Time: 8 times the pruning of all
    matrices, and the evaluations.

    Args:
        model: A dense Llama in evaluation mode.
        batches: The calibration set, with labels on the tokens to score.
        pruner: Prunes one matrix.
        sparsity: Of all prunable weights together, in [0, 1).
        num_evaluations: Budget in passes over all scored rows, at least 1. Evaluating a candidate,
            uniform included, on a part of them counts as that fraction. Never exceeded; the
            calibration pass and the dense model's forward pass come on top.
        seed: Of the mutants and of the order of rows.
        progress: Name of the progress bars, shown for what takes longer than a few seconds; None
            shows none.

    Raises:
        UserError: The calibration set is unfit, or the budget is below 1.
    """
    if num_evaluations < 1:
        raise UserError(
            f"prune.search_evaluations: {num_evaluations} is not enough to measure the uniform "
            "rates; set 1 at least"
        )
    kl = DenseKl(model, batches)
    if kl.num_rows == 0:
        raise UserError(
            "calibration.source: the calibration rows have no completion tokens, so there is no KL "
            "to search by; set rows with answers, or prune.allocation to uniform or owl"
        )
    space = LevelSpace.around(prunable_weights(model), sparsity)
    evolution = _Evolution(
        _Stitched(model, _database(model, batches, pruner, space, progress)),
        kl,
        space,
        random.Random(seed),
        num_evaluations * kl.num_rows,
    )
    with evolution.stitched:
        return evolution.run(progress)


def _database(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    pruner: MatrixPruner,
    space: LevelSpace,
    progress: str | None,
) -> dict[str, dict[int, list[Tensor]]]:
    """Weight name to level to the pruned layer's weight, and its bias where that changes."""
    levels = dict(zip(space.names, space.rates, strict=True))
    database: dict[str, dict[int, list[Tensor]]] = {}

    def visit(name: str, module: nn.Linear, statistics: InputStatistics) -> None:
        database[name] = {
            level: _pruned(pruner, name, module, statistics, rate)
            for level, rate in levels[name].items()
        }

    calibrate(model, batches, visit, pruner.needs, progress)
    return database


def _pruned(
    pruner: MatrixPruner, name: str, module: nn.Linear, statistics: InputStatistics, rate: float
) -> list[Tensor]:
    """What `module.parameters()` become at a rate, on the CPU."""
    _, weight = pruner(name, module, statistics, rate)
    values = [weight]
    if module.bias is not None and pruner.redistribution != "none":
        values.append(balanced_bias(module.bias, module.weight, weight, statistics))
    return [value.to("cpu", copy=True) for value in values]


class _Stitched:
    """The model with one level of every matrix; dense again when the `with` block ends."""

    def __init__(self, model: LlamaForCausalLM, database: dict[str, dict[int, list[Tensor]]]):
        self._database = list(database.values())
        self._parameters = [
            list(model.get_submodule(name.removesuffix(".weight")).parameters())
            for name in database
        ]
        self._dense = [
            [value.detach().to("cpu", copy=True) for value in values] for values in self._parameters
        ]
        self._now: list[int | None] = [None] * len(database)

    def __enter__(self) -> "_Stitched":
        return self

    def __exit__(self, *exception) -> None:
        for parameters, values in zip(self._parameters, self._dense, strict=True):
            _load(parameters, values)

    def show(self, candidate: Candidate) -> None:
        """Exchanges the matrices whose level is another."""
        for i, level in enumerate(candidate):
            if level != self._now[i]:
                _load(self._parameters[i], self._database[i][level])
                self._now[i] = level


@torch.no_grad()
def _load(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values in place; without a value for it, a bias stays."""
    for parameter, value in zip(parameters, values, strict=False):
        parameter.copy_(value)


@dataclass
class _Evolution:
    """One search. KLs are kept row by row, so that a row is never evaluated twice."""

    stitched: _Stitched
    kl: DenseKl
    space: LevelSpace
    rng: random.Random
    budget: int
    """Rows that may be evaluated."""
    used: int = 0
    """Rows evaluated."""

    def run(self, progress: str | None) -> SearchResult:
        """Generations until the budget is used or no new mutant is found."""
        rows = range(self.kl.num_rows)
        parent = self.space.uniform
        nats = self._evaluate(parent, rows)
        seen, history = {parent}, [self._mean(nats)]
        bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
        with tqdm(total=self.budget, initial=self.used, unit="row", **bar) as shown:
            while mutants := self._mutants(parent, seen):
                parent, nats = self._select(mutants, parent, nats)
                history.append(self._mean(nats))
                shown.update(self.used - shown.n)
        return SearchResult(
            self.space.rates_of(parent), history[0], history[1:], self.used / self.kl.num_rows
        )

    def _mutants(self, parent: Candidate, seen: set[Candidate]) -> list[Candidate]:
        """New candidates, as many as the rest of the budget can judge; marks them as seen."""
        mutants: list[Candidate] = []
        most, left = min(NUM_MUTANTS, 2 * self.kl.num_rows), self.budget - self.used
        while len(mutants) < most and self._cost(len(mutants) + 1) <= left:
            draws = (self.space.mutant(parent, self.rng) for _ in range(MAX_DRAWS))
            mutant = next((draw for draw in draws if draw and draw not in seen), None)
            if mutant is None:
                break
            mutants.append(mutant)
            seen.add(mutant)
        return mutants

    def _select(
        self, mutants: list[Candidate], parent: Candidate, parent_nats: dict[int, float]
    ) -> tuple[Candidate, dict[int, float]]:
        """The next parent and its KL on all rows, by successive selection."""
        order = self.rng.sample(range(self.kl.num_rows), self.kl.num_rows)
        pool = {parent: parent_nats, **{mutant: {} for mutant in mutants}}
        for share, num_kept in SELECTION:
            rows = order[: math.ceil(share * len(order))]
            total = {}
            for candidate, nats in pool.items():
                nats.update(self._evaluate(candidate, [row for row in rows if row not in nats]))
                total[candidate] = sum(nats[row] for row in rows)
            pool = {c: pool[c] for c in sorted(pool, key=total.get)[:num_kept]}
        ((winner, nats),) = pool.items()
        if sum(nats.values()) < sum(parent_nats.values()):
            return winner, nats
        return parent, parent_nats

    def _cost(self, num_mutants: int) -> int:
        """Rows that a generation evaluates at most."""
        cost, seen = 0, 0
        for share, num_kept in SELECTION:
            rows = math.ceil(share * self.kl.num_rows)
            cost += num_mutants * (rows - seen)
            seen, num_mutants = rows, min(num_mutants, num_kept)
        return cost

    def _evaluate(self, candidate: Candidate, rows: Sequence[int]) -> dict[int, float]:
        """KL of some rows; the budget pays."""
        if not rows:
            return {}
        self.used += len(rows)
        assert self.used <= self.budget
        self.stitched.show(candidate)
        return self.kl.nats(rows)

    def _mean(self, nats: dict[int, float]) -> float:
        """Nats per scored token over all rows."""
        return sum(nats.values()) / self.kl.num_tokens
