"""Warm-up on teacher completions: TRL's SFTTrainer with forward KL to the teacher.

    loss = kl_weight * KL(p_teacher || p_student) + ce_weight * -log p_student(token)

Both per completion token, averaged over the tokens of the batch (Hinton et al. 2015,
arXiv 1503.02531, at temperature 1). Off-policy: the completions are the teacher's own. TRL's
stable DistillationTrainer samples every completion from the student, which on a freshly pruned
one is noise.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl import SFTTrainer

from pipeline.models.prunable import prunable_weights
from pipeline.training.muon import MuonAdamW
from pipeline.training.sparse_trainer import SparseTrainer


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p_teacher || p_student) over the vocabulary.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V).

    Returns:
        (N,) nats, fp32.
    """
    return F.kl_div(
        student_logits.float().log_softmax(-1),
        teacher_logits.float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)


class DistillTrainer(SparseTrainer, SFTTrainer):
    """Distils a frozen teacher into a sparse student, on `input_ids` and `labels` of a dataset."""

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        kl_weight: float,
        ce_weight: float,
        muon_learning_rate: float | None = None,
        **kwargs,
    ):
        """All arguments of `SFTTrainer`, and the teacher's.

        Args:
            *args: As in `SFTTrainer`.
            teacher: Frozen model with the student's vocabulary.
            kl_weight: Weight of the forward KL.
            ce_weight: Weight of the cross-entropy.
            muon_learning_rate: Of Muon for the prunable matrices; None leaves them to `args.optim`.
            **kwargs: As in `SFTTrainer`.
        """
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.accelerator.device)
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight
        self.muon_learning_rate = muon_learning_rate

    def create_optimizer(self, model=None):
        """Muon with AdamW where a learning rate for it is set, else what TRL creates."""
        if self.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        matrices = list(prunable_weights(self.model).values())
        chosen = {id(weight) for weight in matrices}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in chosen]
        self.optimizer = MuonAdamW(
            matrices,
            rest,
            muon_learning_rate=self.muon_learning_rate,
            learning_rate=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss above; scored are the positions whose next label is not -100.

        `num_items_in_batch` counts the tokens of all ranks, over which gradients are then averaged.
        """
        scored = inputs["labels"][:, 1:] != -100
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        outputs = model(**batch, use_cache=False)
        student_logits = outputs.logits[:, :-1][scored]
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher(**batch, use_cache=False).logits[:, :-1][scored]
        num_tokens = scored.sum() if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_tokens = num_items_in_batch / self.accelerator.num_processes
        divergence = forward_kl(student_logits, teacher_logits).sum() / num_tokens
        cross_entropy = (
            F.cross_entropy(
                student_logits.float(), inputs["labels"][:, 1:][scored], reduction="sum"
            )
            / num_tokens
        )
        self._metrics["train"]["kl"].append(divergence.item())
        num_seen = int(batch["attention_mask"].sum()) * self.accelerator.num_processes
        self.state.num_input_tokens_seen += num_seen  # of all ranks, as if they had as many
        loss = self.kl_weight * divergence + self.ce_weight * cross_entropy
        return (loss, outputs) if return_outputs else loss
