"""Perplexity of a unigram model: the reference above which a language model counts as broken.

    p(token) = (count in the training text + 1) / (tokens of the training text + vocabulary)

It knows how often a token occurs and nothing of what stands before it. The one added to every
count (Laplace's rule) leaves no token impossible.
"""

import math
from collections.abc import Sequence

import torch


def unigram_perplexity(
    train_token_lists: Sequence[Sequence[int]],
    eval_token_lists: Sequence[Sequence[int]],
    vocab_size: int,
) -> float:
    """Perplexity of the evaluation tokens under the frequencies of the training tokens.

    Args:
        train_token_lists: Token ids of each training text.
        eval_token_lists: Token ids of each text to score; every token counts.
        vocab_size: Tokens of the vocabulary; ids are below it.

    Raises:
        ValueError: There is no token to score.
    """
    counts = _counts(train_token_lists, vocab_size)
    scored = _counts(eval_token_lists, vocab_size)
    if scored.sum() == 0:
        raise ValueError("need at least one token to score")
    log_p = ((counts + 1) / (counts.sum() + vocab_size)).log()
    return math.exp(-(scored * log_p).sum().item() / scored.sum().item())


def _counts(token_lists: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """(vocab_size,) fp64: how often each token occurs."""
    tokens = torch.tensor([token for tokens in token_lists for token in tokens], dtype=torch.int64)
    return torch.bincount(tokens, minlength=vocab_size).double()
