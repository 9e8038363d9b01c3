"""Given completions as batches, and a model's logits at their tokens (teacher forcing).

The logits at position t - 1 predict the token at t, so a completion's first token is predicted at
the prompt's last. Padding stands on the right, where a causal model cannot look, so it changes no
result. Sequences of one length go together to keep it short.

The output head is applied to completion positions only, and to a few at a time: logits over a
vocabulary of 128,256 are far larger than everything else in the forward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

MAX_LOGITS = 2**25
"""Most logits held at once: 128 MiB in fp32."""

PROGRESS_DELAY_SECONDS = 2.0

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its completion, the end token included."""


@dataclass(frozen=True)
class CompletionBatch:
    """B prompts with completions, padded on the right to S tokens."""

    input_ids: torch.Tensor
    """(B, S) int64; padding is 0."""
    attention_mask: torch.Tensor
    """(B, S) int64; 1 on prompt and completion."""
    is_completion: torch.Tensor
    """(B, S) bool; True on the completion's tokens, N of them in all."""

    @property
    def targets(self) -> torch.Tensor:
        """(N,) int64: the completion tokens, row by row."""
        return self.input_ids[self.is_completion]


def completion_batches(
    pairs: Sequence[TokenPair], batch_size: int, progress: str | None = None
) -> Iterator[CompletionBatch]:
    """Batches of at most `batch_size` rows, shortest first.

    Args:
        pairs: Prompt and completion of each row.
        batch_size: Rows in a batch.
        progress: Name of a progress bar, shown if going through the batches takes longer than a few
            seconds; None shows none.

    Raises:
        ValueError: There are no rows, or a prompt or completion is empty: the first token of a
            text has nothing that predicts it.
    """
    if not pairs or any(len(prompt) == 0 or len(completion) == 0 for prompt, completion in pairs):
        raise ValueError("need at least one row, each with a prompt and a completion of tokens")
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    starts = range(0, len(pairs), batch_size)
    delay = PROGRESS_DELAY_SECONDS
    for start in tqdm(starts, desc=progress, disable=progress is None, delay=delay):
        yield _batch(pairs[start : start + batch_size])


def _batch(pairs: Sequence[TokenPair]) -> CompletionBatch:
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.int64)
    is_completion = torch.zeros(len(pairs), length, dtype=torch.bool)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        is_completion[row, len(prompt) : end] = True
    return CompletionBatch(input_ids, attention_mask, is_completion)


def completion_logits(model: PreTrainedModel, batch: CompletionBatch) -> Iterator[torch.Tensor]:
    """The logits that predict the completion tokens, in the order of `batch.targets`.

    Args:
        model: `LlamaForCausalLM` in eval mode.
        batch: On any device.

    Yields:
        (n, V) fp32 on the model's device, N rows in all. Two models with one vocabulary yield the
        same cuts.
    """
    hidden = model.model(
        input_ids=batch.input_ids.to(model.device),
        attention_mask=batch.attention_mask.to(model.device),
        use_cache=False,
    ).last_hidden_state
    predicting = hidden[:, :-1][batch.is_completion[:, 1:].to(hidden.device)]
    for chunk in predicting.split(max(1, MAX_LOGITS // model.lm_head.out_features)):
        yield model.lm_head(chunk).float()
