"""How closely a model follows the teacher, on completions that the teacher wrote.

At every token of the teacher's completions both models predict the next one; over the vocabulary

    KL(teacher || model) = sum_v p_teacher(v) (log p_teacher(v) - log p_model(v))

in nats, averaged over all completion tokens (Hinton et al. 2015, arXiv 1503.02531, temperature 1),
and top-1 agreement: the fraction of tokens where both rank the same token first. Neither needs a
right answer, so they still move where accuracy is 0 or saturated. The text is the teacher's: what
the model does after its own mistakes is left to accuracy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.evaluation.completions import TokenPair, completion_batches, completion_logits


@dataclass(frozen=True)
class Agreement:
    """Closeness of one model to the teacher."""

    kl: float | None
    """KL(teacher || model), nats per completion token; 0 for equal models, None if not finite."""
    top1: float
    """Fraction of completion tokens with the same most likely token, in [0, 1]."""
    num_tokens: int
    """Completion tokens compared."""


def kl_divergence(teacher_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) of each row.

    Args:
        teacher_logits: (n, V) fp32.
        logits: (n, V) fp32, the model's.

    Returns:
        (n,) fp32 nats.
    """
    teacher_log_probs = teacher_logits.log_softmax(-1)
    difference = teacher_log_probs - logits.log_softmax(-1)
    return (teacher_log_probs.exp() * difference).sum(-1)


@torch.no_grad()
def agreement_with_teacher(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[TokenPair],
    *,
    batch_size: int,
    progress: str | None = None,
) -> Agreement:
    """Compares a model with its teacher on the teacher's greedy completions.

    Args:
        model: `LlamaForCausalLM` in eval mode.
        teacher: The same, with the same vocabulary; may be on another device.
        pairs: Prompt and the teacher's completion of each row, as token ids, end token included.
        batch_size: Rows in one forward pass of each model.
        progress: Name of the progress bar; None shows none.

    Raises:
        ValueError: There are no rows, one has an empty prompt or completion, or the vocabularies
            differ in size.
    """
    if model.lm_head.out_features != teacher.lm_head.out_features:
        raise ValueError(
            f"the model's vocabulary has {model.lm_head.out_features} entries and the teacher's "
            f"{teacher.lm_head.out_features}: KL needs one vocabulary; choose models of one family"
        )
    total_nats, num_same, num_tokens = 0.0, 0, 0
    for batch in completion_batches(pairs, batch_size, progress):
        both = zip(completion_logits(model, batch), completion_logits(teacher, batch), strict=True)
        for logits, teacher_logits in both:
            teacher_logits = teacher_logits.to(logits.device)
            total_nats += kl_divergence(teacher_logits, logits).sum(dtype=torch.float64).item()
            num_same += (logits.argmax(-1) == teacher_logits.argmax(-1)).sum().item()
            num_tokens += len(logits)
    kl = total_nats / num_tokens
    return Agreement(kl if math.isfinite(kl) else None, num_same / num_tokens, num_tokens)
