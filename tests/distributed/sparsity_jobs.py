"""What one rank does in the tests of thresholds, refinement and state, on shards cut by hand."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pipeline.sparsity import collectives
from pipeline.sparsity.candidates import Candidates
from pipeline.sparsity.groups import run_length, run_zeros, select_in_runs
from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import Regrown, SparsityState
from pipeline.sparsity.storage import load_state, save_state
from pipeline.sparsity.threshold import select_lowest
from tests.unit.hand_shards import cut_state, cut_weights, masks_of

Cuts = dict[str, list[int]]
"""Name to world size + 1 borders of the ranks' ranges."""

SHAPES = {"a": (60, 300), "b": (5, 24), "c": (40, 600), "d": (1, 8)}


def random_cuts(world_size: int, seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Cuts:
    """Any borders; seed 0 gives everything to the last rank, 1 cuts evenly."""
    generator = torch.Generator().manual_seed(seed)
    cuts = {}
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        inner = torch.randint(0, numel + 1, (world_size - 1,), generator=generator).tolist()
        if seed == 0:
            inner = [0] * (world_size - 1)
        elif seed == 1:
            inner = [numel * rank // world_size for rank in range(1, world_size)]
        cuts[name] = [0, *sorted(inner), numel]
    return cuts


def recorded(seed: int, levels: float) -> dict[str, Tensor]:
    """Random values, in steps of 1 / levels, so that few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * levels).round() / levels
        for name, shape in SHAPES.items()
    }


def whole(parts: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """Puts every rank's (offset, values) together, flat."""
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        pieces = sorted((part[name] for part in parts if name in part), key=lambda piece: piece[0])
        joined[name] = torch.cat([values for _, values in pieces])
    return joined


def select(
    rank: int,
    world_size: int,
    scores: dict[str, Tensor],
    ties: dict[str, Tensor],
    scope: str,
    sparsity: float,
    cuts: Cuts,
    shift: int = 0,
) -> dict[str, tuple[int, Tensor]]:
    """The kept elements of this rank's shards; `shift` plants a fault in every offset."""
    weights = cut_weights({name: ties[name] for name in scores}, cuts, rank)
    scored = cut_weights(scores, cuts, rank)
    names = list(scores)
    parts = [
        Candidates(
            group=index if scope == "matrix" else 0,
            name=name,
            index=index,
            offset=weights.shards[name].offset + shift,
            numel=weights.shards[name].numel,
            device=torch.device("cpu"),
            score=scored.shards[name].weight.__getitem__,
            magnitude=weights.shards[name].weight.abs().__getitem__,
        )
        for index, name in enumerate(names)
        if name in weights.shards
    ]
    sizes = [values.numel() for values in scores.values()]
    group = dist.group.WORLD
    if scope in ("matrix", "model"):
        sizes = sizes if scope == "matrix" else [sum(sizes)]
        wanted = [round(sparsity * size) for size in sizes]
        select_lowest(parts, wanted, sizes, names, group)
    else:
        lengths = [run_length(scope, name, scores[name].shape) for name in names]
        zeros = [run_zeros(scope, sparsity, length) for length in lengths]
        select_in_runs(parts, lengths, zeros, names, group)
    return {
        part.name: (part.offset - shift, ~unpack_mask(part.chosen, (part.numel,))) for part in parts
    }


def bytes_sent(rank: int, world_size: int, rows: int) -> int:
    """Bytes of counters that one selection in a (rows, 1000) matrix hands to all-reduce."""
    sent = []

    def count(counts: Tensor, group: Any) -> Tensor:
        sent.append(counts.numel() * counts.element_size())
        return collectives.all_reduce_sum(counts, group)

    from pipeline.sparsity import threshold

    score = torch.randn(rows, 1000)
    part = threshold.whole_candidates(0, "w", 0, score, None)
    part.offset = rank * score.numel()
    original, threshold.all_reduce_sum = threshold.all_reduce_sum, count
    try:
        size = world_size * score.numel()
        threshold.select_lowest([part], [size // 3], [size], ["w"], dist.group.WORLD)
    finally:
        threshold.all_reduce_sum = original
    return sum(sent)


def refinements(
    rank: int, world_size: int, cuts: Cuts | None, rule: dict[str, Any], levels: float
) -> tuple[list, list, dict[str, tuple[int, dict[str, Tensor]]]]:
    """Five refinements; the counts, the sparsities, and all that is left on this rank's shards."""
    weights, state = start(rank, cuts, levels)
    counts, sparsities = [], []
    for step, sparsity in enumerate((0.2, 0.5, 0.5, 0.8, 0.75), 1):
        moved = recorded(100 + step, levels)
        for name, shard in weights.shards.items():
            part = slice(shard.offset, shard.offset + shard.numel)
            mask = unpack_mask(state.masks[name], (shard.numel,))
            state.movement[name].copy_(moved[name].flatten()[part])
            shard.weight.add_(recorded(200 + step, levels)[name].flatten()[part] * mask)
        done = refine(
            state,
            weights,
            RefinementRule(movement_weight=0.5, protect_steps=2, **rule),
            sparsity=sparsity,
            regrow_fraction=0.1,
            step=step,
        )
        counts.append((done.pruned, done.regrown, done.survived))
        sparsities.append(state.sparsity(weights))
    return counts, sparsities, contents(weights, state)


def start(rank: int, cuts: Cuts | None, levels: float) -> tuple[ShardedWeights, SparsityState]:
    """Dense weights with moments; without cuts every rank holds all."""
    moments = {"exp_avg": recorded(2, 50.0)}
    moments["exp_avg_sq"] = {n: m.square() for n, m in moments["exp_avg"].items()}
    group = None if cuts is None else dist.group.WORLD
    weights = cut_weights(recorded(1, levels), cuts, rank, group, moments)
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    return weights, cut_state(masks, recorded(3, levels), weights)


def contents(
    weights: ShardedWeights, state: SparsityState
) -> dict[str, tuple[int, dict[str, Tensor]]]:
    """Name to offset and everything known of each element; -1 where a weight never regrew."""
    found = {}
    for name, shard in weights.shards.items():
        steps = torch.full((shard.numel,), -1)
        steps[state.regrown[name].indices.long()] = state.regrown[name].steps.long()
        found[name] = (
            shard.offset,
            {
                "mask": masks_of(state, weights)[name],
                "movement": state.movement[name].clone(),
                "regrown": steps,
                "weight": shard.weight.clone(),
                "exp_avg": weights.moments(shard, "exp_avg").clone(),
            },
        )
    return found


def example_state(weights: ShardedWeights, dtype: torch.dtype) -> SparsityState:
    """A state with something in every field, a function of name and place alone."""
    masks = {name: values > 0 for name, values in recorded(11, 100.0).items()}
    state = SparsityState.from_masks(masks, weights, dtype)
    for name, shard in weights.shards.items():
        part = slice(shard.offset, shard.offset + shard.numel)
        state.movement[name].copy_(recorded(12, 1e9)[name].flatten()[part])
        places = torch.arange(shard.offset, shard.offset + shard.numel)
        once = ((places % 7 == 3) & masks[name].flatten()[part]).nonzero().squeeze(1)
        steps = (places[once] % 90).int()
        state.regrown[name] = Regrown(once.to(state.regrown[name].indices.dtype), steps)
    return state


def save(rank: int, world_size: int, folder: str, cuts: Cuts | None, dtype: torch.dtype) -> dict:
    """Saves the example."""
    weights, _ = start(rank, cuts, 1e9)
    state = example_state(weights, dtype)
    save_state(Path(folder), state, weights)
    return contents(weights, state)


def load(rank: int, world_size: int, folder: str, cuts: Cuts | None, again: str | None) -> dict:
    """Loads a state, and saves it into another folder."""
    weights, _ = start(rank, cuts, 1e9)
    state = load_state(Path(folder), weights)
    if again is not None:
        save_state(Path(again), state, weights)
    return contents(weights, state)


def gather(rank: int, world_size: int, cuts: Cuts | None) -> dict[str, Tensor | None]:
    """The whole masks of the example."""
    weights, _ = start(rank, cuts, 1e9)
    return dict(example_state(weights, torch.float32).whole_masks(weights))


def refused(rank: int, world_size: int, what: str, cuts: Cuts) -> str:
    """The message with which every rank refuses something that only one rank sees."""
    weights, state = start(rank, cuts, 50.0)
    rule = {"scope": "matrix", "score": "magnitude"}
    if what == "nan":
        if "c" in weights.shards and weights.shards["c"].offset == 0:
            weights.shards["c"].weight[0] = float("nan")
    elif what == "nan row":
        rule["scope"] = "row"
        if "c" in weights.shards and weights.shards["c"].offset == 0:
            weights.shards["c"].weight[0] = float("nan")
    elif what == "movement":
        rule["score"] = "movement"
        for values in state.movement.values():
            values.zero_()
    elif what == "fisher":
        rule["score"] = "fisher"
        if rank == 0:
            weights.optimizer.state.clear()
    rule = RefinementRule(movement_weight=0.5, protect_steps=0, min_density=0.0, **rule)
    try:
        refine(state, weights, rule, sparsity=0.5, regrow_fraction=0.1, step=1)
    except ValueError as error:
        return str(error)
    return "not refused"
