r"""Groups sampled under two masks: where a bonus for sparsity acts on the student.

GRPO sees differences inside a group only, and a group's completions all come from one mask, so a
bonus for that mask's sparsity is a constant. Here the odd completions of a group come from a mask
that the schedule will bind, the first that is sparser by `MIN_DIFFERENCE`, formed with `refine` and
taken back with `Undo`. A right one earns

    weight * (s' - s)    s' the sparsity of that mask, s of the present one

What still answers right under the sparser mask is reinforced before that mask is bound, and the
mean reward under either mask is logged. The difference and not `weight * s'` (`rewards/sparsity.py`
with s' - s for s): right completions of either mask would earn `weight * s` alike, which only
re-weighs correctness, and with it the angle of the advantages would stay below (s' - s) / s at any
weight. In a group that is half right 1 - cosine is about (weight * (s' - s))^2 / 4, which is 1e-3
at weight 6.4 and a difference of 0.01.

Every second completion, because then each rank has as many of either kind, however a group lies
across ranks: all ranks generate twice and refine at the same moment, as ZeRO-3's gathers need.
Completions stay where TRL expects them.

Under the sparser mask the weights are theta', the loss is that of the present theta, and so

    E_theta[A grad log pi_theta] = E_theta'[A (pi_theta / pi_theta') grad log pi_theta]

Given the tokens before it, a token's ratio pi_theta / pi_theta' is what TRL forms against
`old_per_token_logps`, and its gradient is the right side. As in PPO (arXiv 1707.06347) the ratio of
a token stands for that of the whole prefix, and beyond 1 +- epsilon it is clipped where it would
push further: what the present mask would hardly have said teaches little. So log pi_theta' is
scored while the sparser mask is bound, one forward without gradients over half the batch. The other
half is on policy: its old values are TRL's where TRL has them, else those of the loss itself, whose
ratio is exactly 1.

`scale_rewards: group` divides by a group's spread, so in a group that is all right the bonus alone
decides, at any weight; under `none` it keeps its size.

Left out: vLLM, whose copy of the weights would have to be sent twice a batch, and evaluation by
TRL, which samples under the present mask. A rank that fails in between ends the run with the
sparser mask bound; nothing is saved then.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from trl import GRPOTrainer

from pipeline.errors import UserError
from pipeline.rules.idle_terms import MIN_DIFFERENCE
from pipeline.sparsity.refine import refine
from pipeline.sparsity.undo import Undo
from rewards.sparsity import sparsity_bonuses

PRESENT, SPARSER = slice(0, None, 2), slice(1, None, 2)
"""Rows of a batch by the mask that samples them."""

logger = logging.getLogger(__name__)

Generate = Callable[[list[list[int]]], tuple[list[list[int]], None]]
Score = Callable[[list[list[int]], list[list[int]]], Tensor]


def sparsity(prompts: list, completions: list, **columns) -> list[float]:
    """TRL reward function of the bonus; `TwoMasks.reward` fills it in, after `correctness`."""
    return [0.0] * len(completions)


class TwoMasks:
    """Samples half of each group of a trainer under the mask that comes next."""

    def __init__(self, trainer: GRPOTrainer):
        """Checks that every rank has halves.

        Raises:
            UserError: A rank has an odd number of completions.
        """
        self.trainer = trainer
        self.undo = Undo()
        self.sparser: float | None = None
        """Sparsity of the second mask of the present batch; None where there is none."""
        self._said: set[str] = set()
        args = trainer.args
        num_rows = args.per_device_train_batch_size * args.steps_per_generation
        if num_rows % 2 or trainer.num_generations % 2:
            raise UserError(
                f"grpo.num_masks: 2: {num_rows} completions on a rank (per_device_train_batch_size "
                f"x steps_per_generation), {trainer.num_generations} of a prompt "
                "(num_generations); set both to even numbers, or grpo.num_masks: 1, instead"
            )

    def sample(self, prompt_ids: list[list[int]], generate: Generate, score: Score) -> list:
        """Samples the completions of a batch. Every rank calls it.

        Args:
            prompt_ids: B prompts of this rank, a group's beside each other.
            generate: Prompts to completions, by the weights as they are.
            score: Prompts and completions to log-probabilities (b, T), by the weights as they are.

        Returns:
            B completions, in the order of the prompts.
        """
        self.sparser = None
        if not self._bind():
            return generate(prompt_ids)[0]
        callback, prompts = self.trainer.sparsity, prompt_ids[SPARSER]
        self.sparser = callback.state.sparsity(callback.weights)
        completions = generate(prompts)[0]
        self._log_probs = score(prompts, completions)
        self.undo.take_back(callback.state, callback.weights)
        both = [None] * len(prompt_ids)
        both[PRESENT], both[SPARSER] = generate(prompt_ids[PRESENT])[0], completions
        return both

    def _bind(self) -> bool:
        """Binds the sparser mask, if there is one. The same on every rank."""
        callback = self.trainer.sparsity
        schedule = callback.sparsity.schedule
        step = callback.sparsity.first_step + self.trainer.state.global_step
        position, due = callback.position(step), None
        if schedule is not None:
            due = schedule.next_sparser(position, callback.measured + MIN_DIFFERENCE)
        if due is None:
            self._say(f"no refinement is left that makes it {MIN_DIFFERENCE} sparser", step)
            return False
        try:
            refine(
                callback.state,
                callback.weights,
                callback.sparsity.rule,
                sparsity=schedule.sparsity_at(due),
                regrow_fraction=schedule.regrow_fraction_at(due),
                step=step + due - position,
                undo=self.undo,
            )
        except ValueError as error:  # on every rank, and nothing was changed
            self._say(f"refused, {error}", step)
            return False
        return True

    def _say(self, why: str, step: int) -> None:
        """Logs why there is no second mask, once for each kind of reason."""
        kind, _, _ = why.partition(",")
        if kind not in self._said:
            self._said.add(kind)
            logger.info(
                "grpo: step %d: no second mask to sample under (%s): groups come from the present "
                "one, and none earns a sparsity bonus",
                step,
                why,
            )

    def reward(self, rewards: Tensor) -> None:
        """Fills the bonus in, and logs the mean reward under either mask.

        Args:
            rewards: (B of all ranks, K) as TRL gathered them, before its weights; changed in place.
        """
        trainer, names = self.trainer, self.trainer.reward_func_names
        present = trainer.sparsity.measured
        sparser = present if self.sparser is None else self.sparser
        if sparsity.__name__ in names:
            gained = rewards.new_zeros(len(rewards))
            gained[SPARSER] = sparser - present
            correct = rewards[:, names.index("correctness")] >= 1
            rewards[:, names.index(sparsity.__name__)] = sparsity_bonuses(correct, gained, 1.0)
        if self.sparser is None:
            return
        total = (rewards * trainer.reward_weights.to(rewards)).nansum(1)
        metrics = trainer._metrics["train"]
        for name, rows, zeros in (("present", PRESENT, present), ("sparser", SPARSER, sparser)):
            metrics[f"masks/{name}/reward"].append(total[rows].mean().item())
            metrics[f"masks/{name}/sparsity"].append(zeros)

    def note(self, output: dict[str, Tensor]) -> None:
        """Adds to TRL's batch (B, T) which rows were sampled under the sparser mask, and how."""
        if self.sparser is None:
            return
        old = torch.zeros(output["completion_ids"].shape, device=self._log_probs.device)
        old[SPARSER, : self._log_probs.size(1)] = self._log_probs
        output["sparser_log_probs"] = old
        output["is_sparser"] = torch.zeros(len(old), dtype=torch.bool, device=old.device)
        output["is_sparser"][SPARSER] = True


def fill_old_log_probs(inputs: dict[str, Tensor], present: Tensor) -> None:
    """Gives TRL's loss the log-probabilities under which each token was sampled.

    Args:
        inputs: A micro-batch; `old_per_token_logps` (b, T) is set where it was sampled under two
            masks.
        present: (b, T) log-probabilities that the loss has computed, without gradient.
    """
    if "is_sparser" in inputs:
        old = inputs.get("old_per_token_logps", present)
        inputs["old_per_token_logps"] = torch.where(
            inputs["is_sparser"].unsqueeze(1), inputs["sparser_log_probs"], old
        )
