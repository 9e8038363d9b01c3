"""Whether each term of the reward mix acts, measured on the first batches of a run.

`rewards/acting.py` has the measure and says when a term acts. Its inputs are at hand while TRL
trains, so it costs no forward pass: the reward of every function, which TRL gathers from all ranks,
and the teacher's term of every token, which the loss forms micro-batch by micro-batch in the order
into which TRL has shuffled the completions of a rank. Both are put together here, by the row that a
completion had when it was scored.

A single batch may have no group that tells terms apart. So batches are judged until each term has
acted in one of them, at most `MAX_BATCHES`; a term is named with the most it has acted.

Left out: a batch with a completion that no function scores, and what stands in the loss itself
(`rewards/acting.py`); `normalize_then_sum`, under which nothing is said.
"""

import logging
from collections import Counter

import torch
from torch import Tensor
from trl import GRPOTrainer

from rewards.acting import ACTS, influences

MAX_BATCHES = 10
"""Generation batches after which a term that has not acted is reported."""

logger = logging.getLogger(__name__)


class ActingTerms:
    """Judges the generation batches of a trainer until it has said which terms act."""

    def __init__(self, trainer: GRPOTrainer, token_term: str | None):
        """`token_term`: name of what the loss adds to each token's advantage; None for nothing."""
        self.trainer = trainer
        self.token_term = token_term
        self.found: dict[str, float] = {}
        """Term to the most it has acted, 1 - cosine in [0, 2]."""
        self.is_done = trainer.multi_objective_aggregation != "sum_then_normalize"
        self._num_batches = 0
        self._mask: Tensor | None = None

    def begin(self, rewards: Tensor, completion_mask: Tensor) -> None:
        """Takes up a generation batch, if more is to be judged. Every rank calls it.

        Args:
            rewards: (B of all ranks, K) as TRL gathered them, before its weights; NaN for None.
            completion_mask: (B, T) of this rank, in the order of sampling.
        """
        if self.is_done:
            return
        none = rewards.isnan()
        self._rewards = rewards.masked_fill(none & ~none.all(1, keepdim=True), 0.0)
        self._mask = completion_mask
        self._term = torch.zeros(completion_mask.shape, device=completion_mask.device)
        self._seen = torch.zeros(len(completion_mask), dtype=torch.bool)
        if self.token_term is None:
            self._judge()

    def add(self, rows: Tensor, term: Tensor) -> None:
        """Takes the token term of a micro-batch; the last one of a batch has it judged.

        Args:
            rows: (b,) the completions, by their place in the order of sampling.
            term: (b, T) what is added to their advantages, weight included.
        """
        if self._mask is None:
            return
        self._term[rows] = term
        self._seen[rows.cpu()] = True
        if self._seen.all():
            self._judge()

    def _judge(self) -> None:
        trainer, names = self.trainer, self.trainer.reward_func_names
        labels = [n if Counter(names)[n] == 1 else f"{n} {i + 1}" for i, n in enumerate(names)]
        mask, term = (
            trainer.accelerator.gather(trainer.accelerator.pad_across_processes(part, dim=1))
            for part in (self._mask, self._term)
        )
        self._mask = None
        self._num_batches += 1
        try:
            found = influences(
                dict(zip(labels, self._rewards.unbind(1), strict=True)),
                dict(zip(labels, trainer.reward_weights.tolist(), strict=True)),
                trainer.num_generations,
                mask,
                {} if self.token_term is None else {self.token_term: term},
                trainer.scale_rewards,
            )
        except ValueError:  # no live group, or a completion without a reward
            found = {}
        for name, influence in found.items():
            self.found[name] = max(influence, self.found.get(name, 0.0))
        acts = bool(self.found) and min(self.found.values()) >= ACTS
        self.is_done = acts or self._num_batches >= MAX_BATCHES
        if self.is_done:
            self._say()

    def _say(self) -> None:
        """Logs one line: what each term does, or which one does nothing."""
        texts = {name: f"{name} {influence:.2g}" for name, influence in self.found.items()}
        idle = [text for name, text in texts.items() if self.found[name] < ACTS]
        if not texts:
            logger.info(
                "grpo: whether each reward term acts is unknown: no group of the first %d batches "
                "had an advantage",
                self._num_batches,
            )
        elif not idle:
            logger.info("grpo: each term acts: %s", ", ".join(texts.values()))
        else:
            logger.warning(
                "grpo: %s turned no advantage by as much as %g (1 - cosine) in the first %d "
                "batches, which gave %s: inside a group it is constant, a multiple of another "
                "term, or too small; set a larger weight for it, or leave it out of rewards",
                " and ".join(idle),
                ACTS,
                self._num_batches,
                ", ".join(texts.values()),
            )
