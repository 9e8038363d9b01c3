"""Warm-up on teacher completions: TRL's SFTTrainer with forward KL to the teacher.

    loss = kl_weight * KL(p_teacher || p_student) + ce_weight * -log p_student(token)

Both per completion token, averaged over the tokens of the batch (Hinton et al. 2015,
arXiv 1503.02531, at temperature 1). Off-policy: the completions are the teacher's own. TRL's
stable DistillationTrainer samples every completion from the student, which on a freshly pruned
one is noise.

Neither model's logits are ever there for all tokens: the student's head makes them a chunk of
tokens at a time (`models/chunked_head.py`), and the teacher's head those of the same tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from pipeline.models.chunked_head import ChunkedHead, chunked_head
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


def completion_losses(
    model: nn.Module,
    head: ChunkedHead,
    teacher: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
) -> Tensor:
    """What each completion token costs the student, in one forward pass of both models.

    Args:
        model: The student, or a wrapper around it.
        head: Its output head.
        teacher: Frozen.
        input_ids: (B, S) int64.
        attention_mask: (B, S), 1 = token.
        labels: (B, S) int64, the token itself where it is scored, else -100.

    Returns:
        (N, 2) fp32 nats of the N scored tokens: forward KL to the teacher, cross-entropy.
    """
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    scored = labels != -100
    tokens = labels[scored]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    teacher_head = teacher.get_output_embeddings()
    with torch.no_grad():
        hidden = teacher.base_model(**batch).last_hidden_state[scored]

    def score(student_logits: Tensor, chosen: slice) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(hidden[chosen])
        divergence = forward_kl(student_logits, teacher_logits)
        cross_entropy = F.cross_entropy(student_logits, tokens[chosen], reduction="none")
        return torch.stack([divergence, cross_entropy], -1)

    with head.scoring(scored, score):
        return model(**batch).logits[scored]


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
        self._student_head = chunked_head(self.accelerator.unwrap_model(self.model))
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
        batch = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        with self.accelerator.autocast():
            losses = completion_losses(model, self._student_head, self.teacher, *batch)
        num_tokens = len(losses) if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_tokens = num_items_in_batch / self.accelerator.num_processes
        divergence, cross_entropy = losses.sum(0) / num_tokens
        self._metrics["train"]["kl"].append(divergence.item())
        num_seen = int(inputs["attention_mask"].sum()) * self.accelerator.num_processes
        self.state.num_input_tokens_seen += num_seen  # of all ranks, as if they had as many
        loss = self.kl_weight * divergence + self.ce_weight * cross_entropy
        return (loss, CausalLMOutput(loss)) if return_outputs else loss
