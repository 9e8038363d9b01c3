"""Exact selection of the lowest scores over all ranks, without gathering a single score.

Radix select on 32-bit keys (`keys.py`): each rank counts the first 8 bits of its keys, one
all-reduce adds the counters of all groups, every rank finds the digit in which the wanted rank
falls, and the next round counts only what begins with it. Four rounds give the threshold. Elements
that equal it are ordered by |w|, then by a hash of name and place, then by the name's number, each
in at most four rounds and only where a group is still tied. The result has exactly the wanted size
and is the same for every sharding.

Each round would cost a pass over the shard. So a sample, every 61st element of the whole weight or
fewer, first gives a bracket that should hold the threshold; one vectorised pass decides what lies
outside, and the rounds see the few per cent inside. Exact counts show whether the bracket held;
where it did not, all elements of the group are open again. The bracket saves time and never changes
the result.

Sent per selection: two rounds of (2 groups, 256) counters for the sample, up to four of (groups,
256) for the elements, and four for each level of ties, whatever the size of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeline.sparsity.bits import count_bits
from pipeline.sparsity.candidates import DIGIT_BITS, LEVELS, Candidates
from pipeline.sparsity.collectives import all_reduce_sum
from pipeline.sparsity.groups import run_length, run_zeros, select_in_runs
from pipeline.sparsity.keys import KEY_BITS, key_value
from pipeline.sparsity.masks import unpack_mask

SAMPLE_STRIDE = 61
"""Least distance of sampled elements. Odd, so that the sample runs through many columns of a
matrix."""
SAMPLE_SIZE = 1 << 16
"""Sampled elements of a group, about, where the least distance would give more."""
SAMPLE_BITS = 16
"""The bracket's ends are known up to so many bits, less than 1 % of the value."""
MIN_SAMPLE = 256
"""Elements of a group in the sample below which it does without a bracket."""
MARGIN = 3.0
"""Half width of the bracket, in standard deviations of the sample's rank."""


def select_lowest(
    candidates: Sequence[Candidates],
    wanted: Sequence[int],
    sizes: Sequence[int],
    names: Sequence[str],
    process_group: ProcessGroup | None,
) -> None:
    """Selects the lowest scores of many groups at once, into `chosen`. Every rank calls it.

    Args:
        candidates: This rank's part of the groups; each element in at most one of them.
        wanted: How many elements each group selects over all ranks.
        sizes: How many elements compete in each group over all ranks.
        names: Every weight's name, the same on every rank, for errors.
        process_group: The ranks that divide the elements; None: this rank holds all.

    Raises:
        ValueError: A score is NaN, or a group is asked for more than it has.
    """
    num_wanted, size = torch.tensor([wanted, sizes], dtype=torch.int64)
    for number, total in zip(wanted, sizes, strict=True):
        if not 0 <= number <= total:
            raise ValueError(f"num_zeros: {number} is outside [0, {total}]")
    low, high = _brackets(candidates, num_wanted, size, process_group)
    nan = torch.zeros(len(names), dtype=torch.int64)
    counts = torch.zeros(2, len(wanted), dtype=torch.int64)
    for part in candidates:
        group = part.group
        nan[part.index] += part.split(key_value(int(low[group])), key_value(int(high[group])))
        counts[0, group] += count_bits(part.chosen)
        counts[1, group] += part.count_open()
    sums = all_reduce_sum(torch.cat([counts.flatten(), nan]), process_group)
    num_chosen, num_open, nan = sums.split([len(wanted), len(wanted), len(names)])
    if nan.any():
        index = int(nan.nonzero()[0])
        raise ValueError(f"score: {int(nan[index])} values of {names[index]} are NaN")

    trivial = (num_wanted == 0) | (num_wanted == size)
    held = (num_chosen <= num_wanted) & (num_wanted <= num_chosen + num_open)
    for part in candidates:
        if trivial[part.group]:
            part.reset(take=bool(num_wanted[part.group]))
        elif not held[part.group]:
            part.reset()
    buckets = Buckets(
        torch.where(trivial, 0, num_wanted - torch.where(held, num_chosen, 0)),
        torch.where(held, low, 0),
        torch.where(held, _bit_length(high - low), KEY_BITS),
    )
    for level in range(LEVELS):
        if not buckets.rank.any():
            return
        _search(candidates, level, buckets, process_group)
        buckets.start_again()
    assert not buckets.rank.any(), "no two elements share hash and name"


@dataclass
class Buckets:
    """For each group, a range of keys that holds the threshold. int64 (groups,) each."""

    rank: Tensor
    """The wanted rank, from 1, among the open elements of the bucket; 0: all is decided."""
    low: Tensor
    """The lowest key of the bucket."""
    bits: Tensor
    """The bucket has 2^bits keys."""

    def start_again(self) -> None:
        """All keys of another level."""
        self.low, self.bits = torch.zeros_like(self.low), torch.full_like(self.bits, KEY_BITS)


def _search(
    candidates: Sequence[Candidates],
    level: int,
    buckets: Buckets,
    process_group: ProcessGroup | None,
    until_bits: int = 0,
) -> None:
    """Radix select on one level's keys: narrows every bucket to 2^until_bits keys.

    With `until_bits` 0 a group is done as soon as all open elements of its bucket are wanted; what
    is open in the end, in a bucket of one key, is tied.
    """
    while True:
        searching = (buckets.rank > 0) & (buckets.bits > until_bits)
        if not searching.any():
            return
        shift = (buckets.bits - DIGIT_BITS).clamp(min=until_bits)
        counts = torch.zeros(len(shift), 1 << DIGIT_BITS, dtype=torch.int64)
        for part in candidates:
            group = part.group
            if searching[group]:
                counts[group] += part.count(level, int(buckets.low[group]), int(shift[group])).cpu()
        counts = all_reduce_sum(counts, process_group)
        cumulative = counts.cumsum(1)
        digit = (cumulative < buckets.rank[:, None]).sum(1).clamp(max=counts.shape[1] - 1)
        within = counts.gather(1, digit[:, None]).squeeze(1)
        before = cumulative.gather(1, digit[:, None]).squeeze(1) - within
        buckets.rank = torch.where(searching, buckets.rank - before, buckets.rank)
        buckets.low = torch.where(searching, buckets.low + (digit << shift), buckets.low)
        buckets.bits = torch.where(searching, shift, buckets.bits)
        whole = searching & (buckets.rank == within) & (until_bits == 0)
        for part in candidates:
            group = part.group
            if searching[group]:
                low = int(buckets.low[group])
                high = low + (1 << int(buckets.bits[group]))
                part.narrow(level, low, high, take_equal=bool(whole[group]))
        buckets.rank = torch.where(whole, 0, buckets.rank)


def _brackets(
    candidates: Sequence[Candidates],
    num_wanted: Tensor,
    size: Tensor,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """For each group two keys, int64 (groups,), between which its threshold most likely lies."""
    num_groups = len(size)
    low, high = torch.zeros_like(size), torch.full_like(size, (1 << KEY_BITS) - 1)
    useful = (num_wanted > 0) & (num_wanted < size) & (size >= MIN_SAMPLE * SAMPLE_STRIDE)
    if not useful.any():
        return low, high
    strides = (size // SAMPLE_SIZE).clamp(min=SAMPLE_STRIDE) | 1
    samples = []
    sampled = torch.zeros_like(size)
    for part in candidates:
        if useful[part.group]:
            groups = (part.group, num_groups + part.group)
            samples += part.sampled(int(strides[part.group]), groups)
            sampled[part.group] += samples[-1].numel
    sampled = all_reduce_sum(sampled, process_group)
    rank = num_wanted / size.clamp(min=1) * sampled
    margin = MARGIN * (rank * (1.0 - rank / sampled.clamp(min=1))).clamp(min=1.0).sqrt()
    ends = torch.cat([(rank - margin).floor(), (rank + margin).ceil()]).long()
    inside = (ends >= 1) & (ends <= sampled.repeat(2))
    buckets = Buckets(torch.where(inside, ends, 0), low.repeat(2), torch.full_like(ends, KEY_BITS))
    _search(samples, 0, buckets, process_group, until_bits=SAMPLE_BITS)
    lower, upper = buckets.low.split(num_groups)
    return (
        torch.where(inside[:num_groups], lower, low),
        torch.where(inside[num_groups:], upper + (1 << SAMPLE_BITS) - 1, high),
    )


def _bit_length(numbers: Tensor) -> Tensor:
    """How many bits each int64 number needs."""
    return torch.tensor([int(number).bit_length() for number in numbers], dtype=torch.int64)


def mask_by_score(
    score: Tensor, num_zeros: int, tie_break: Tensor | None = None, name: str = "score"
) -> Tensor:
    """Keeps all but the `num_zeros` lowest scores of one matrix.

    Args:
        score: Any shape, compared in fp32. High = keep.
        num_zeros: How many elements are pruned, 0 to `score.numel()`.
        tie_break: Same shape; its absolute value orders equal scores, high = keep. A hash of name
            and position orders the rest.
        name: The weight's name.

    Returns:
        Bool mask of the score's shape, True = kept, with exactly `num_zeros` False.

    Raises:
        ValueError: `num_zeros` is out of range or a score is NaN.
    """
    part = whole_candidates(0, name, 0, score, tie_break)
    select_lowest([part], [num_zeros], [score.numel()], [name], None)
    return ~unpack_mask(part.chosen, score.shape)


def masks_by_score(
    scores: dict[str, Tensor],
    sparsity: float,
    scope: str,
    tie_break: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of many whole matrices at one target sparsity.

    Args:
        scores: Name to score. High = keep.
        sparsity: Fraction of zeros, in [0, 1].
        scope: `matrix` prunes each matrix to the target, `model` ranks all weights together, `row`
            prunes each row, `N:M` keeps n of every m consecutive elements of a row.
        tie_break: Name to tensor whose absolute value orders equal scores.

    Returns:
        Name to bool mask, True = kept. Zeros: round(sparsity x elements) of each matrix, of all, or
        of each row; m - n of each run of m elements.

    Raises:
        ValueError: A score is NaN, or the scope is unknown or does not fit sparsity or shapes.
    """
    names = list(scores)
    parts = [
        whole_candidates(
            index if scope == "matrix" else 0, name, index, score, tie_break and tie_break[name]
        )
        for index, (name, score) in enumerate(scores.items())
    ]
    sizes = [score.numel() for score in scores.values()]
    if scope in ("matrix", "model"):
        sizes = sizes if scope == "matrix" else [sum(sizes)]
        select_lowest(parts, [round(sparsity * size) for size in sizes], sizes, names, None)
    else:
        lengths = [run_length(scope, name, score.shape) for name, score in scores.items()]
        zeros = [run_zeros(scope, sparsity, length) for length in lengths]
        select_in_runs(parts, lengths, zeros, names, None)
    return {part.name: ~unpack_mask(part.chosen, scores[part.name].shape) for part in parts}


def whole_candidates(
    group: int, name: str, index: int, score: Tensor, tie_break: Tensor | None
) -> Candidates:
    """All elements of one matrix, by score and |tie_break|."""
    flat = score.detach().reshape(-1)
    ties = flat if tie_break is None else tie_break.detach().reshape(-1)
    return Candidates(
        group=group,
        name=name,
        index=index,
        offset=0,
        numel=flat.numel(),
        device=flat.device,
        score=lambda at: flat[at].float(),
        magnitude=lambda at: ties[at].float().abs(),
    )


def concatenate(tensors: dict[str, Tensor]) -> Tensor:
    """All elements as one flat tensor, in the dictionary's order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def split_like(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `concatenate`: names and shapes from `like`, values from `flat`."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.reshape(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }
