"""Greedy accuracy: the fraction of held-out prompts that a model's one greedy answer gets right.

Deterministic, so that two models on the same rows can be compared prompt by prompt (see
`intervals.py`). Left out: sampled accuracy and pass@k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.tasks import Row
from pipeline.rollouts import generate


@dataclass(frozen=True)
class AccuracyResult:
    """One model's greedy answers. The lists run over the rows, in their order."""

    accuracy: float
    """Fraction of prompts answered correctly, in [0, 1]."""
    correct: list[bool]
    """Whether the verifier gave full marks (a score of 1)."""
    completions: list[str]
    """What the model wrote, without special tokens."""
    num_prompts: int


def greedy_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    encode: Callable[[str], list[int]],
    verifier: Callable[[str, str], float],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> AccuracyResult:
    """Answers every row greedily and verifies the answers.

    Args:
        model: Causal language model in eval mode.
        tokenizer: Its tokenizer.
        rows: Held-out prompts with their answers, at least one.
        encode: A row's prompt to the token ids the model continues.
        verifier: (completion, answer) to a score; 1 or more is correct.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts generated together.
        progress: Name of the progress bar; None shows none.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("accuracy needs at least one held-out prompt, got none")
    completion_ids = generate(
        model,
        tokenizer,
        [encode(row.prompt) for row in rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    correct = [
        verifier(completion, row.answer) >= 1
        for completion, row in zip(completions, rows, strict=True)
    ]
    return AccuracyResult(sum(correct) / len(rows), correct, completions, len(rows))
