"""Sampled accuracy: the chance that at least one of k sampled answers to a prompt is right, pass@k.

Of n answers sampled for a prompt c are right. With n >= k the unbiased estimate is (Chen et al.
2021, arXiv 2107.03374, section 2.1)

    pass@k = 1 - C(n - c, k) / C(n, k)

which is the share of right answers for k = 1; 1 - (1 - c/n)^k would be too low. Its mean over the
prompts is what is reported; the interval takes prompts as the sample, answers to one prompt are no
more independent than that.

All models answer with one seed, temperature and batch size; sampling depends on all three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.tasks import Row
from pipeline.rollouts import sample_rollouts


@dataclass(frozen=True)
class SampledAccuracy:
    """One model's sampled answers, counted."""

    num_correct: list[int]
    """Right answers to each prompt, in the order of the rows."""
    num_samples: int
    """Answers sampled for each prompt."""
    temperature: float

    def pass_at(self, k: int) -> list[float]:
        """pass@k of each prompt, in [0, 1]."""
        return [pass_at_k(self.num_samples, correct, k) for correct in self.num_correct]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right.

    Args:
        num_samples: Answers sampled, n.
        num_correct: Right ones among them, in [0, n].
        k: Answers that are given, in [1, n].

    Raises:
        ValueError: The counts are not such counts.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} right among {num_samples}: no estimate")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def sampled_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    encode: Callable[[str], list[int]],
    verifier: Callable[[str, str], float],
    *,
    num_samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: str | None = None,
) -> SampledAccuracy:
    """Samples answers to every row and counts the right ones.

    Args:
        model: Causal language model in eval mode.
        tokenizer: Its tokenizer.
        rows: Held-out prompts with their answers, at least one.
        encode: A row's prompt to the token ids the model continues.
        verifier: (completion, answer) to a score; 1 or more is correct.
        num_samples: Answers to each prompt.
        temperature: Of the sampling, above 0.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Answers generated together.
        seed: Of the sampling.
        progress: Name of the progress bar; None shows none.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("accuracy needs at least one held-out prompt, got none")
    rollouts = sample_rollouts(
        model,
        tokenizer,
        rows,
        encode,
        verifier,
        num_rollouts=num_samples * len(rows),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    correct = [rollout.reward >= 1 for rollout in rollouts]
    counts = [sum(correct[row :: len(rows)]) for row in range(len(rows))]
    return SampledAccuracy(counts, num_samples, temperature)
