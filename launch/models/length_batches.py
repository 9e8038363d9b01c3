"""Batches of whole rows for `make_model.py`, every row once in an epoch.

The rows are shuffled, sorted by length within pools of 16 batches, cut, and the batches shuffled:
rows of one batch are of similar length and little is spent on padding. Left out: several rows
packed into one sequence, because the pipeline never shows a model two.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import count

import torch

from pipeline.pruning.batches import IGNORED_LABEL

POOLED_BATCHES = 16


def length_batches(
    sequences: Sequence[Sequence[int]], *, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Epoch after epoch, without end.

    Args:
        sequences: Token ids of each row, its end token included.
        batch_size: Rows in a batch, at most.
        seed: Of the order, which differs from epoch to epoch.

    Yields:
        (B, S) token ids, padded on the right, and their labels: the token, or -100 at padding.
    """
    for epoch in count():
        for rows in _epoch(sequences, batch_size, random.Random(seed * 10**6 + epoch)):
            yield _pad([sequences[row] for row in rows])


def _epoch(
    sequences: Sequence[Sequence[int]], batch_size: int, chance: random.Random
) -> list[list[int]]:
    """Row numbers of each batch."""
    order = list(range(len(sequences)))
    chance.shuffle(order)
    pools = _cut(order, batch_size * POOLED_BATCHES)
    order = [row for pool in pools for row in sorted(pool, key=lambda row: len(sequences[row]))]
    batches = _cut(order, batch_size)
    chance.shuffle(batches)
    return batches


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _pad(sequences: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, : len(sequence)] = ids[row, : len(sequence)]
    return ids, labels
