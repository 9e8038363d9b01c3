"""Refinement verified by reward: candidate masks answer the probe prompts before one is bound.

Candidates at a due step are the present mask and up to four proposals, which differ in

    stride   the schedule's next, or half of it; regrowth is halved with it
    score    refine.score, or beside it `mix`, in which movement counts (beside `mix`: `magnitude`)

Each is formed by `refine`, judged in the place of the present mask, and taken back (`undo.py`), so
there is no second copy of the model. First all are ranked cheaply, by the log-probability of the
teacher's right completions; of each stride the best is confirmed by greedy answers. Their rewards,
and when one is good enough to be bound, are in `mask_choice.py`; where none is, the present mask
stays and the schedule waits (`schedule.py`). A score that cannot be formed yet, because no movement
was observed, drops out.

Cost of a decision, for n probe prompts, m of them with a completion, and answers of T tokens: at
most 5 m sequences forward and 3 n T tokens one at a time, and seven refinements (without movement
in the score it is less). Ranks share the prompts, sum the results and then decide,
so all decide alike.

All but the mask that is bound leaves no trace: after a refusal the run is bit for bit the one in
which nothing was due.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import Trainer

from pipeline.sparsity.refine import Refinement, RefinementRule, refine
from pipeline.sparsity.schedule import RefinementSchedule, Waiting
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.undo import Undo
from pipeline.training.mask_choice import JudgedMask, MaskReward, choose_mask
from pipeline.training.probe import Probe, ProbePrompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How masks are judged."""

    prompts: Sequence[ProbePrompt]
    """Those that are asked, the same on every rank."""
    verifier: Callable[[str, str], float]
    """(completion, answer) to a score; 1 or more is right."""
    reward: MaskReward
    max_new_tokens: int
    """Longest answer, in tokens."""
    batch_size: int
    """Prompts in one forward pass of a rank."""


@dataclass(frozen=True)
class Proposal:
    """A mask that could be bound."""

    halvings: int
    """How often its stride is halved."""
    position: float
    """Where in the schedule it stands."""
    rule: RefinementRule

    @property
    def name(self) -> str:
        """For the log."""
        return "full stride" if self.halvings == 0 else f"1/{2**self.halvings} of a stride"


class VerifiedRefinement:
    """Makes the decisions of one stage."""

    def __init__(
        self,
        trainer: Trainer,
        verification: Verification,
        schedule: RefinementSchedule,
        rule: RefinementRule,
        stage: str,
    ):
        """To be made before training begins, see `Probe`.

        Args:
            trainer: A `SparseTrainer`.
            verification: How masks are judged.
            schedule: Targets by position.
            rule: How weights are chosen.
            stage: For the log.
        """
        self.stage = stage
        self.reward = verification.reward
        self.schedule = schedule
        self.rules = {rule.score: rule}
        if rule.score != "mix" and rule.movement_weight > 0:
            self.rules["mix"] = replace(rule, score="mix")
        elif rule.score == "mix":
            self.rules["magnitude"] = replace(rule, score="magnitude")
        self.probe = Probe(
            trainer,
            verification.prompts,
            verification.verifier,
            max_new_tokens=verification.max_new_tokens,
            batch_size=verification.batch_size,
        )

    def decide(
        self, state: SparsityState, weights: ShardedWeights, waiting: Waiting, step: int
    ) -> dict[str, Any]:
        """Binds the best candidate. Every rank calls it, between two optimizer steps.

        Args:
            state: Masks and movement; changed only if a proposal is bound.
            weights: The shards.
            waiting: How far the schedule has come.
            step: The present step.

        Returns:
            The entry of the list of refinements, but for stage and step: `reward_before` is of the
            present mask, `reward_after` of the one bound or, where all were refused, of the most
            rewarded proposal; null where it is not finite.

        Raises:
            ValueError: No proposal can be formed. Nothing is changed then.
        """
        bench = _Bench(state, weights, self.schedule, step, self.probe)
        present = bench.judge(None)
        finalists = bench.ranked(self.proposals(waiting, step))
        judged = [bench.judge(proposal, nats) for proposal, nats in finalists]
        chosen = choose_mask(present, judged, self.reward)
        shown = chosen if chosen is not None else self._most_rewarded(judged)
        proposal, mask = finalists[shown][0], judged[shown]
        after = waiting.decided(step, None if chosen is None else proposal.halvings)
        done = Refinement(0, 0, 0) if chosen is None else bench.form(proposal)
        self._say(step, proposal, after, present, mask, is_bound=chosen is not None)
        entry = {
            "target": self.schedule.sparsity_at(proposal.position),
            **asdict(done),
            "accepted": chosen is not None,
            "reward_before": _or_none(self.reward.of(present)),
            "reward_after": _or_none(self.reward.of(mask)),
            "score": proposal.rule.score,
            "waited": after.waited,
            "halvings": after.halvings,
        }
        if chosen is None:
            del entry["survived"]
        return entry

    def proposals(self, waiting: Waiting, step: int) -> list[Proposal]:
        """The masks that could be bound after a step."""
        return [
            Proposal(halvings, waiting.ahead(step, halvings), rule)
            for halvings in (waiting.halvings, waiting.halvings + 1)
            for rule in self.rules.values()
        ]

    def _most_rewarded(self, masks: Sequence[JudgedMask]) -> int:
        return max(range(len(masks)), key=lambda i: _or_lowest(self.reward.of(masks[i])))

    def _say(
        self,
        step: int,
        proposal: Proposal,
        after: Waiting,
        present: JudgedMask,
        mask: JudgedMask,
        *,
        is_bound: bool,
    ) -> None:
        """One line of what was chosen and why."""
        kept = f"mask kept at sparsity {present.sparsity:.4f}, best proposal refused"
        low, high = self.reward.difference(mask, present)
        logger.info(
            "%s: step %d: %s (%s, score %s): reward %.4f after %.4f, difference [%+.4f, %+.4f]; %s",
            self.stage,
            step,
            f"mask bound at sparsity {mask.sparsity:.4f}" if is_bound else kept,
            proposal.name,
            proposal.rule.score,
            self.reward.of(mask),
            self.reward.of(present),
            low,
            high,
            f"{after.waited:g} steps late" if after.waited else "on time",
        )


@dataclass(frozen=True)
class _Bench:
    """Where candidates of one step are tried out."""

    state: SparsityState
    weights: ShardedWeights
    schedule: RefinementSchedule
    step: int
    probe: Probe

    def form(self, proposal: Proposal, undo: Undo | None = None) -> Refinement:
        """Puts a proposal in the place of the present mask."""
        return refine(
            self.state,
            self.weights,
            proposal.rule,
            sparsity=self.schedule.sparsity_at(proposal.position),
            regrow_fraction=self.schedule.regrow_fraction_at(proposal.position)
            / 2**proposal.halvings,
            step=self.step,
            undo=undo,
        )

    def ranked(self, proposals: Sequence[Proposal]) -> list[tuple[Proposal, Tensor]]:
        """Of each stride the proposal with the highest log-probability, and its (n,) nats.

        Raises:
            ValueError: None can be formed.
        """
        best: dict[int, tuple[Proposal, Tensor]] = {}
        failure = None
        for proposal in proposals:
            undo = Undo()
            try:
                self.form(proposal, undo)
            except ValueError as error:
                failure = failure or error
                continue
            nats = self.probe.log_probs()
            undo.take_back(self.state, self.weights)
            rival = best.get(proposal.halvings)
            if rival is None or _or_lowest(nats.sum()) > _or_lowest(rival[1].sum()):
                best[proposal.halvings] = proposal, nats
        if not best:
            raise failure
        return list(best.values())

    def judge(self, proposal: Proposal | None, nats: Tensor | None = None) -> JudgedMask:
        """Greedy answers under a proposal, or under the present mask; `nats` where known."""
        undo = Undo()
        if proposal is not None:
            self.form(proposal, undo)
        judged = JudgedMask(
            sparsity=self.state.sparsity(self.weights),
            correct=self.probe.correct(),
            log_probs=self.probe.log_probs() if nats is None else nats,
            has_completion=self.probe.has_completion,
        )
        if proposal is not None:
            undo.take_back(self.state, self.weights)
        return judged


def _or_lowest(value: Tensor | float) -> float:
    """A number that compares; NaN is below all."""
    return -math.inf if math.isnan(value) else float(value)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
