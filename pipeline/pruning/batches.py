"""Calibration batches: whole sequences (prompt and completion), padded on the left.

Every token that is no padding is seen by the layer statistics; only completion tokens are scored by
the loss whose gradients the calibration movement needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

IGNORED_LABEL = -100
"""The label of a token that the loss leaves out (the default of PyTorch's cross-entropy)."""


class CalibrationBatch(NamedTuple):
    """One batch of B sequences of S tokens, padding included."""

    input_ids: torch.Tensor
    """(B, S) int64."""
    attention_mask: torch.Tensor
    """(B, S) int64, 1 = token, 0 = padding."""
    labels: torch.Tensor
    """(B, S) int64: the token itself where the loss scores it, else -100."""


def calibration_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int,
) -> list[CalibrationBatch]:
    """Joins prompts and completions to left-padded batches, in order.

    Args:
        prompts: Token ids of each prompt.
        completions: Token ids of each completion, its end token included.
        pad_token_id: Fills the left side.
        batch_size: Sequences per batch; the last batch may be smaller.

    Returns:
        Batches whose labels are the completion tokens.
    """
    pairs = list(zip(prompts, completions, strict=True))
    batches = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        length = max(len(prompt) + len(completion) for prompt, completion in chunk)
        input_ids = torch.full((len(chunk), length), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for row, (prompt, completion) in enumerate(chunk):
            size = len(prompt) + len(completion)
            input_ids[row, length - size :] = torch.tensor([*prompt, *completion])
            attention_mask[row, length - size :] = 1
            first = length - len(completion)
            labels[row, first:] = input_ids[row, first:]
        batches.append(CalibrationBatch(input_ids, attention_mask, labels))
    return batches
