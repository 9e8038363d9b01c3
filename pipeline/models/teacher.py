"""The frozen teacher in training: no gradients, log-probabilities of the completions only."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def completion_log_probs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion: int,
    *,
    micro_batch_size: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities that a model gives to the last tokens of each sequence.

    Args:
        model: The teacher.
        input_ids: (B, S) int64, prompts padded on the left, completions on the right.
        attention_mask: (B, S), 1 = token.
        num_completion: T, how many tokens at the end are scored.
        micro_batch_size: Sequences in one forward.
        temperature: Divides the logits, as in sampling.

    Returns:
        (B, T) fp32 nats. Values at padding are meaningless; mask them.
    """
    rows = []
    for ids, mask in zip(
        input_ids.split(micro_batch_size), attention_mask.split(micro_batch_size), strict=True
    ):
        logits = model(
            input_ids=ids, attention_mask=mask, logits_to_keep=num_completion + 1, use_cache=False
        ).logits[:, :-1]
        log_probs = (logits.float() / temperature).log_softmax(-1)
        rows.append(log_probs.gather(-1, ids[:, -num_completion:].unsqueeze(-1)).squeeze(-1))
    return torch.cat(rows)
