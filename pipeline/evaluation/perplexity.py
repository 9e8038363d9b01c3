"""Perplexity of given completions: exp of the mean negative log-likelihood of their tokens.

    perplexity = exp(-1/N sum_i log p(token_i | prompt, tokens before i))

over all N completion tokens of all rows together, the end token included; the prompt's tokens are
context and are not scored. 1 is certainty, the size of the vocabulary is blind guessing.

Perplexities of different texts or sequence lengths do not compare, so both are reported. Left out:
cutting a long text into windows (`text_perplexity.py`), which are such pairs with the overlap as
prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.evaluation.completions import (
    CompletionBatch,
    TokenPair,
    completion_batches,
    completion_logits,
)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it was taken on."""

    value: float | None
    """At least 1; None where it is not finite, as with a broken model."""
    num_tokens: int
    """Completion tokens scored."""
    seq_len: int
    """Tokens of the longest prompt with its completion."""
    stride: int | None = None
    """Tokens from one window's start to the next one's; None where the rows are no windows."""


@torch.no_grad()
def token_nll(model: PreTrainedModel, batch: CompletionBatch) -> torch.Tensor:
    """Negative log-likelihood of every completion token.

    Returns:
        (N,) fp32 nats, in the order of `batch.targets`, on the model's device.
    """
    targets = batch.targets.to(model.device)
    parts, start = [], 0
    for logits in completion_logits(model, batch):
        part = targets[start : start + len(logits)]
        parts.append(torch.nn.functional.cross_entropy(logits, part, reduction="none"))
        start += len(logits)
    return torch.cat(parts)


def completion_perplexity(
    model: PreTrainedModel,
    pairs: Sequence[TokenPair],
    *,
    batch_size: int,
    progress: str | None = None,
) -> Perplexity:
    """Perplexity of the completions given their prompts.

    Args:
        model: `LlamaForCausalLM` in eval mode.
        pairs: Prompt and completion of each row, as token ids, end token included.
        batch_size: Rows in one forward pass.
        progress: Name of the progress bar; None shows none.

    Raises:
        ValueError: There are no rows, or one has an empty prompt or completion.
    """
    total_nats, num_tokens = 0.0, 0
    for batch in completion_batches(pairs, batch_size, progress):
        nll = token_nll(model, batch)
        total_nats += nll.sum(dtype=torch.float64).item()
        num_tokens += len(nll)
    value = torch.tensor(total_nats / num_tokens, dtype=torch.float64).exp().item()
    value = value if math.isfinite(value) else None
    return Perplexity(value, num_tokens, max(len(p) + len(c) for p, c in pairs))
