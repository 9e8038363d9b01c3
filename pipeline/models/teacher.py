"""The frozen teacher in training: what it says of given completions, without gradients.

One forward pass a micro-batch; the head runs at completion tokens only, in chunks
(`chunked_head.py`), so it makes no more than `MAX_LOGITS` logits at once, whatever batch and
vocabulary. What is kept is one number per token, k + 1 numbers and k indices, or all of them.
Inputs travel to where the model is and results travel back, so it may live on another device.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.chunked_head import Score, chunked_head, score_completions
from rewards.teacher_kl import merge_rest


def completion_log_probs(
    model: PreTrainedModel | nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion: int,
    *,
    micro_batch_size: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities that a model gives to the last tokens of each sequence.

    Args:
        model: The teacher, or DeepSpeed's engine around it.
        input_ids: (B, S) int64, prompts padded on the left, completions on the right.
        attention_mask: (B, S), 1 = token.
        num_completion: T, how many tokens at the end are scored.
        micro_batch_size: Sequences in one forward.
        temperature: Divides the logits, as in sampling.

    Returns:
        (B, T) fp32 nats, 0 at padding.
    """

    def score_of(tokens: Tensor) -> Score:
        def score(logits: Tensor, chosen: slice) -> Tensor:
            log_probs = (logits / temperature).log_softmax(-1)
            return log_probs.gather(-1, tokens[chosen].unsqueeze(-1))

        return score

    batch = input_ids, attention_mask, num_completion
    return _in_micro_batches(model, *batch, score_of, micro_batch_size).squeeze(-1)


def completion_targets(
    model: PreTrainedModel | nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion: int,
    *,
    micro_batch_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The teacher's distribution at each completion token, whole or its `top_k` largest parts.

    Args:
        model: As in `completion_log_probs`, as are the arguments up to `temperature`.
        input_ids: (B, S).
        attention_mask: (B, S).
        num_completion: T.
        micro_batch_size: Sequences in one forward.
        temperature: Divides the logits.
        top_k: How many probabilities are kept one by one; the rest becomes one. None, or the
            vocabulary's size and above, keeps all.

    Returns:
        Log-probabilities in nats, fp32 (B, T, V), and None; or (B, T, k + 1), the rest last, and
        the k tokens they belong to, int64 (B, T, k), most probable first. 0 at padding.
    """
    vocab_size = chunked_head(getattr(model, "module", model)).out_features
    whole = top_k is None or top_k >= vocab_size

    def score(logits: Tensor, chosen: slice) -> Tensor:
        log_probs = (logits / temperature).log_softmax(-1)
        if whole:
            return log_probs
        indices = log_probs.topk(top_k).indices
        return torch.cat([merge_rest(log_probs, indices), indices.float()], -1)  # exact below 2^24

    batch = input_ids, attention_mask, num_completion
    targets = _in_micro_batches(model, *batch, lambda tokens: score, micro_batch_size)
    return (
        (targets, None) if whole else (targets[..., : top_k + 1], targets[..., top_k + 1 :].long())
    )


@torch.no_grad()
def _in_micro_batches(
    model, input_ids, attention_mask, num_completion, score_of, micro_batch_size
) -> Tensor:
    """Scores (B, T, M) on the inputs' device; `score_of` makes a `Score` from (N,) tokens."""
    head = chunked_head(getattr(model, "module", model))
    device = next(model.parameters()).device
    parts = []
    for ids, mask in zip(
        input_ids.split(micro_batch_size), attention_mask.split(micro_batch_size), strict=True
    ):
        ids, mask = ids.to(device), mask.to(device)
        tokens = ids[:, -num_completion:][mask[:, -num_completion:].bool()]
        scores = score_completions(model, head, ids, mask, num_completion, score_of(tokens))
        parts.append(scores.to(input_ids.device))
    return torch.cat(parts)
