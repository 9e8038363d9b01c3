"""TRL's GRPOTrainer plus a per-token teacher term in the advantage.

GRPO gives each completion one advantage (B,). The teacher adds one for each sampled token (B, T):

    A[b, t] = A_group[b] - weight * clip(log p_student[b, t] - log p_teacher[b, t])

(reverse KL, k1 estimator, as in KDRL, arXiv 2506.02208; see `rewards/teacher_kl.py`). The term is
formed where the loss has just computed the student's log-probabilities, so the student runs no
second forward; the teacher's are added to TRL's batch when the completions are scored.
"""

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from pipeline.models.teacher import completion_log_probs
from pipeline.training.sparse_trainer import SparseTrainer
from rewards.teacher_kl import combine, teacher_advantages


class TeacherGRPOTrainer(SparseTrainer, GRPOTrainer):
    """GRPO of a sparse student under a frozen teacher."""

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel | None = None,
        teacher_kl_weight: float = 0.0,
        teacher_kl_clip: float = 5.0,
        teacher_micro_batch_size: int = 64,
        **kwargs,
    ):
        """All arguments of `GRPOTrainer`, and the teacher's.

        Args:
            *args: As in `GRPOTrainer`.
            teacher: Frozen model with the student's vocabulary; None leaves the term out.
            teacher_kl_weight: Advantage per nat.
            teacher_kl_clip: Bound of one token's term, in nats.
            teacher_micro_batch_size: Sequences in one teacher forward.
            **kwargs: As in `GRPOTrainer`.
        """
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.teacher_kl_weight = teacher_kl_weight
        self.teacher_kl_clip = teacher_kl_clip
        self.teacher_micro_batch_size = teacher_micro_batch_size
        self._loss_inputs: dict | None = None
        if teacher is not None:
            teacher.to(self.accelerator.device)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.teacher is not None:
            output["teacher_log_probs"] = completion_log_probs(
                self.teacher,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                micro_batch_size=self.teacher_micro_batch_size,
                temperature=self.temperature,
            )
        return output

    def _compute_loss(self, model, inputs):
        self._loss_inputs = dict(inputs)
        try:
            return super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs, entropies, auxiliary_loss = super()._get_per_token_logps_and_entropies(
            *args, **kwargs
        )
        if self._loss_inputs is not None and self.teacher is not None:
            self._add_teacher_advantages(log_probs.detach())
        return log_probs, entropies, auxiliary_loss

    def _add_teacher_advantages(self, student_log_probs: torch.Tensor) -> None:
        """Replaces the advantages (B,) by (B, T), before the present loss reads them."""
        inputs = self._loss_inputs
        mask = inputs["completion_mask"]
        term = teacher_advantages(
            student_log_probs,
            inputs["teacher_log_probs"],
            mask,
            weight=self.teacher_kl_weight,
            clip=self.teacher_kl_clip,
        )
        inputs["advantages"] = combine(inputs["advantages"], term)
        mode = "train" if self.model.training else "eval"
        reverse_kl = ((student_log_probs - inputs["teacher_log_probs"]) * mask).sum() / mask.sum()
        self._metrics[mode]["teacher_kl"].append(self.accelerator.gather(reverse_kl).mean().item())
