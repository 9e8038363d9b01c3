"""Selection inside short runs of a weight: its rows, or every m consecutive elements (N:M).

A run is decided where it lies, by sorting nothing: the 32 bits of the threshold are found one after
the other by counting, for all runs of a chunk at once. Equal scores are ordered by |w|, then by the
hash of name and place, as in `threshold.py`. Only runs that a shard's border cuts are exchanged:
every rank sends its pieces of them, puts together those it has a piece of, decides them as their
other owners do, and keeps its own part. A run may be cut into more than two pieces.

Scopes: `row`, where a run is a row of the weight; `N:M`, such as `2:4`, which keeps n of every m
consecutive elements of a row (Mishra et al. 2021, arXiv 2104.08378).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeline.sparsity.candidates import CHUNK, Candidates
from pipeline.sparsity.collectives import all_reduce_sum
from pipeline.sparsity.keys import KEY_BITS, hash_keys, order_keys
from pipeline.sparsity.masks import pack_mask, unpack_mask

Fields = dict[str, Tensor]
"""What a decision needs of each element, by name, in tensors of one shape."""
Decide = Callable[[str, Tensor, Fields], Tensor]
"""Weight name, int64 (runs,) place of each run's first element, fields (runs, length) to bool
(runs, length): what is selected."""


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one shard."""

    name: str
    """The weight's name."""
    offset: int
    """The shard's first element in the flattened weight; runs are counted from the weight's."""
    numel: int
    """Elements of the shard."""
    length: int
    """Elements of a run."""
    device: torch.device
    fields: Callable[[slice], Fields]
    """Local range to tensors (n,)."""


def run_length(scope: str, name: str, shape: Sequence[int]) -> int:
    """Elements of a run under `row` or `N:M`.

    Raises:
        ValueError: The scope has no runs, or m does not divide the rows.
    """
    if scope == "row":
        return shape[-1]
    _, length = parse_n_m(scope)
    if shape[-1] % length:
        raise ValueError(f"scope: {scope}: rows of {name} have {shape[-1]} elements; set another m")
    return length


def run_zeros(scope: str, sparsity: float, length: int) -> int:
    """Zeros of each run.

    Raises:
        ValueError: `N:M` fixes another sparsity.
    """
    if scope == "row":
        return round(sparsity * length)
    kept, length = parse_n_m(scope)
    if abs(sparsity - (1.0 - kept / length)) > 1e-6:
        raise ValueError(f"sparsity: {sparsity}: scope {scope} makes it {1.0 - kept / length}")
    return length - kept


def parse_n_m(scope: str) -> tuple[int, int]:
    """The two numbers of `N:M`.

    Raises:
        ValueError: It is not of that form, or n is not in 1 to m - 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", scope)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"scope: {scope!r} is unknown; set matrix, model, row or N:M such as 2:4")
    return int(match[1]), int(match[2])


def select_in_runs(
    candidates: Sequence[Candidates],
    lengths: Sequence[int],
    wanted: Sequence[int],
    names: Sequence[str],
    process_group: ProcessGroup | None,
) -> None:
    """Selects the lowest competing scores of every run, into `chosen`. Every rank calls it.

    Args:
        candidates: This rank's shards; `group` is not looked at.
        lengths: Elements of a run, by name number.
        wanted: How many each run selects, by name number.
        names: Every weight's name, the same on every rank.
        process_group: The ranks that divide the elements; None: this rank holds all.

    Raises:
        ValueError: A score is NaN, or a run has fewer elements that compete.
    """
    problems = torch.zeros(2, len(names), dtype=torch.int64)
    number = {name: index for index, name in enumerate(names)}

    def decide(name: str, first: Tensor, fields: Fields) -> Tensor:
        eligible, index = fields["eligible"], number[name]
        problems[0, index] += int(fields["score"].isnan().sum())
        problems[1, index] += int((eligible.sum(1) < wanted[index]).sum())
        num_selected = torch.full_like(first, wanted[index])
        return lowest_in_runs(
            fields["score"], fields["magnitude"], eligible, num_selected, name, first
        )

    runs = [_candidate_runs(part, lengths[part.index]) for part in candidates]
    chosen = decide_runs(runs, decide, process_group)
    problems = all_reduce_sum(problems, process_group)
    for row, what in zip(problems, ("values are NaN", "a run has too few elements"), strict=True):
        if row.any():
            raise ValueError(f"score: {names[int(row.nonzero()[0])]}: {what}")
    for part, bits in zip(candidates, chosen, strict=True):
        part.chosen = bits


def decide_runs(
    parts: Sequence[Runs], decide: Decide, process_group: ProcessGroup | None
) -> list[Tensor]:
    """Decides every run of this rank's shards. Every rank calls it.

    Args:
        parts: This rank's shards.
        decide: The decision, elementwise in runs. It must not raise: other ranks wait.
        process_group: The ranks that divide the elements; None: this rank holds all.

    Returns:
        Packed bits of the selected elements of each of the parts.
    """
    exchanged = _exchange(parts, process_group)
    selected = []
    for part in parts:
        flags = torch.zeros(part.numel, dtype=torch.bool, device=part.device)
        for start, stop in _whole_runs(part):
            places = torch.arange(part.offset + start, part.offset + stop, device=part.device)
            fields = {
                key: values.reshape(-1, part.length)
                for key, values in part.fields(slice(start, stop)).items()
            }
            flags[start:stop] = decide(part.name, places[:: part.length], fields).reshape(-1)
        for start, stop in _border_pieces(part):
            run, place = divmod(part.offset + start, part.length)
            fields = {key: v.to(part.device) for key, v in exchanged[part.name, run].items()}
            first = torch.tensor([run * part.length], device=part.device)
            whole = decide(part.name, first, fields).reshape(-1)
            flags[start:stop] = whole[place : place + stop - start]
        selected.append(pack_mask(flags))
    return selected


def lowest_in_runs(
    score: Tensor,
    magnitude: Tensor,
    competing: Tensor,
    num_selected: Tensor,
    name: str,
    first: Tensor,
) -> Tensor:
    """The lowest elements of each run.

    Args:
        score: fp32 (runs, length).
        magnitude: fp32 (runs, length): orders equal scores.
        competing: Bool (runs, length): the elements to choose from.
        num_selected: int64 (runs,): how many, at most as many as compete; fewer where it is less
            than 1.
        name: The weight's name.
        first: int64 (runs,): place of each run's first element in the flattened weight.

    Returns:
        Bool (runs, length).
    """
    levels = (
        lambda: order_keys(score),
        lambda: order_keys(magnitude),
        lambda: hash_keys(
            name, first[:, None] + torch.arange(competing.shape[1], device=first.device)
        ),
    )
    left = torch.minimum(num_selected, competing.sum(1)).clamp(min=0)
    chosen, undecided = torch.zeros_like(competing), competing & (left > 0)[:, None]
    for level in levels:
        if not undecided.any():
            break
        keys = level()
        threshold = _kth_key(keys, undecided, left)[:, None]
        below = undecided & (keys < threshold)
        chosen |= below
        left = left - below.sum(1)
        undecided &= keys == threshold
        all_wanted = left == undecided.sum(1)
        chosen |= undecided & all_wanted[:, None]
        undecided &= ~all_wanted[:, None]
    return chosen


def _kth_key(keys: Tensor, undecided: Tensor, rank: Tensor) -> Tensor:
    """int64 (runs,): the `rank`-th lowest (from 1) of the undecided keys of each run."""
    # Columns are runs, so that counting adds whole rows; int32, which is faster to compare.
    columns = torch.where(undecided, keys, 2**KEY_BITS - 1).t().sub(2**31).int().contiguous()
    low = torch.full_like(rank, -(2**31))
    high = torch.full_like(rank, 2**31 - 1)
    less = torch.empty_like(columns)
    for _ in range(KEY_BITS):
        middle = (low + high) >> 1
        enough = torch.le(columns, middle.int(), out=less).sum(0, dtype=torch.int32) >= rank
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle + 1)
    return high + 2**31


def _candidate_runs(part: Candidates, length: int) -> Runs:
    """The fields that `select_in_runs` decides on."""
    eligible = unpack_mask(part.eligible, (part.numel,))
    return Runs(
        part.name,
        part.offset,
        part.numel,
        length,
        part.device,
        lambda at: {
            "score": part.score(at),
            "magnitude": part.magnitude(at),
            "eligible": eligible[at],
        },
    )


def _border_pieces(part: Runs) -> list[tuple[int, int]]:
    """Local ranges of runs that the shard's borders cut: none, one or two."""
    head = min(-part.offset % part.length, part.numel)
    tail = max(head, part.numel - (part.offset + part.numel) % part.length)
    return [cut for cut in ((0, head), (tail, part.numel)) if cut[0] < cut[1]]


def _whole_runs(part: Runs) -> list[tuple[int, int]]:
    """Local ranges of about `CHUNK` elements, each made of whole runs."""
    start = -part.offset % part.length
    stop = part.numel - (part.offset + part.numel) % part.length
    step = max(1, CHUNK // part.length) * part.length
    return [(place, min(place + step, stop)) for place in range(start, stop, step)]


def _exchange(
    parts: Sequence[Runs], process_group: ProcessGroup | None
) -> dict[tuple[str, int], Fields]:
    """Fields (1, length) of every run that a border cuts, by name and number of the run."""
    if process_group is None:
        return {}
    pieces = [
        (
            (part.name, (part.offset + start) // part.length),
            part.offset + start,
            {key: values.cpu() for key, values in part.fields(slice(start, stop)).items()},
        )
        for part in parts
        for start, stop in _border_pieces(part)
    ]
    everyone: list = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, pieces, group=process_group)
    runs: dict[tuple[str, int], list[Fields]] = {}
    for run, _, fields in sorted(
        (piece for pieces in everyone for piece in pieces), key=lambda piece: piece[:2]
    ):
        runs.setdefault(run, []).append(fields)
    return {
        run: {key: torch.cat([piece[key] for piece in cut])[None] for key in cut[0]}
        for run, cut in runs.items()
    }
