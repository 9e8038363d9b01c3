"""The same masks and the same movement in every layout, when training repeats one recorded run.

`python -m pytest -s tests/distributed/test_parity.py` prints the table of `RESULTS.md`;
with `PARITY_JSON=FILE` in the environment it is written there as well.
"""

import copy
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.artifacts import git_commit, installed_versions, write_json
from tests.distributed.parity_jobs import (
    LAST_SPARSITY,
    MASK,
    MOVEMENT,
    NUM_STEPS,
    REGROWN,
    SCORE,
    SPARSITY_AFTER,
    Record,
    generate,
    reload,
    train,
)
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
"""Of the positions; relative to the threshold; relative to the largest movement."""
REFERENCE = ("plain", 1)
LAYOUTS = {
    "ddp x2": ("ddp", 2),
    "zero1 x2": ("zero1", 2),
    "zero2 x2": ("zero2", 2),
    "zero3 x2": ("zero3", 2),
}
OWN_ORDER = {
    "plain x1, each batch in one piece": (("plain", 1, 1), REFERENCE),
    "zero2 x2, both clipped": (("zero2", 2, 2, True, 1.0), ("plain", 1, 2, True, 1.0)),
    "zero3 x2, norms without a copy": (("zero3", 2, 2, False), ("plain", 1, 2, False)),
}
"""Name to a run and its reference, which add in different orders (see `parity_jobs`)."""

Moment = dict[str, Tensor]
"""Name to fp32 (4, elements of the whole weight), rows as in `parity_jobs`."""


@dataclass
class Parity:
    """How far a training run is from the reference."""

    num_differing: int = 0
    """Positions at which the masks ever differ."""
    fraction_differing: float = 0.0
    """Of all positions."""
    farthest_score: float = 0.0
    """Largest |score - threshold| / |threshold| of a weight that comes to differ."""
    largest_residual: float = 0.0
    """Of |S - S_ref| / max |S_ref|, the maximum taken over the matrix's weights on the same side
    of the mask, for kept and pruned ones have different units."""
    mean_residual: float = 0.0
    """The largest mean over one side of one matrix at one moment."""


def check(parity: Parity) -> None:
    """The criterion."""
    assert parity.fraction_differing <= TOLERANCE, parity
    assert parity.farthest_score <= TOLERANCE, parity
    assert parity.largest_residual <= TOLERANCE, parity


def put_together(records: list[Record], moment: int) -> Moment:
    """What all ranks held at one moment. Where each holds all, they hold the same."""
    if not records[0].is_divided:
        for other in records[1:]:
            for name, (_, rows) in records[0].moments[moment].items():
                assert torch.equal(rows, other.moments[moment][name][1]), name
        records = records[:1]
    found = {}
    for name, shape in records[0].shapes.items():
        found[name] = torch.full((4, shape.numel()), torch.nan)
        for record in records:
            if name in record.moments[moment]:
                offset, rows = record.moments[moment][name]
                found[name][:, offset : offset + rows.shape[1]] = rows
    return found


def moments_of(records: list[Record]) -> list[Moment]:
    return [put_together(records, moment) for moment in range(len(records[0].moments))]


@cache
def trained(layout, world_size, *options) -> tuple[Record, list[Moment]]:
    records = run_on_ranks(world_size, train, layout, *options)
    return records[0], moments_of(records)


def compare(expected: list[Moment], found: list[Moment]) -> Parity:
    parity = Parity()
    for name in expected[0]:
        ever = torch.zeros(expected[0][name].shape[1], dtype=torch.bool)
        for moment, (wanted, got) in enumerate(zip(expected, found, strict=True)):
            wanted, got = wanted[name], got[name]
            new = (wanted[MASK] != got[MASK]) & ~ever
            if new.any():
                distance = score_distance(expected, name, moment, new)
                parity.farthest_score = max(parity.farthest_score, distance)
            ever |= new
            for side in (0.0, 1.0):
                here = (wanted[MASK] == side) & ~ever
                reference = wanted[MOVEMENT, here].double()
                residual = (got[MOVEMENT, here] - reference).abs() / reference.abs().max()
                parity.largest_residual = max(parity.largest_residual, float(residual.max()))
                parity.mean_residual = max(parity.mean_residual, float(residual.mean()))
        parity.num_differing += int(ever.sum())
    total = sum(rows.shape[1] for rows in expected[0].values())
    parity.fraction_differing = parity.num_differing / total
    return parity


def score_distance(expected: list[Moment], name: str, moment: int, where: Tensor) -> float:
    """How far from the threshold of the refinement before `moment` the weights at `where` were."""
    if moment == 0:
        return torch.inf  # the first masks are given
    before, after = expected[moment - 1][name], expected[moment][name]
    was_kept, is_kept = before[MASK] == 1, after[MASK] == 1
    prune_threshold = before[SCORE, was_kept & ~is_kept].max()
    regrow_threshold = before[MOVEMENT, ~was_kept & is_kept].abs().min()
    score = torch.where(was_kept, before[SCORE], before[MOVEMENT].abs())
    threshold = torch.where(was_kept, prune_threshold, regrow_threshold)
    return float(((score - threshold).abs() / threshold.abs())[where].max())


def test_each_refinement_changes_a_part_of_the_mask():
    record, moments = trained(*REFERENCE)
    total = sum(shape.numel() for shape in record.shapes.values())
    assert total > 2e5, "else no position may differ, whatever the tolerance"
    assert len(record.refinements) == len(SPARSITY_AFTER) == 4
    for refinement, (before, after) in zip(record.refinements, pairwise(moments), strict=True):
        flipped = sum(int((before[name][MASK] != after[name][MASK]).sum()) for name in before)
        assert flipped == refinement.pruned + refinement.regrown >= 0.01 * total
        assert refinement.regrown > 0
        assert refinement.survived > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(name):
    (reference, expected), (record, found) = trained(*REFERENCE), trained(*LAYOUTS[name])
    check(compare(expected, found))
    counts = [[(r.pruned, r.regrown) for r in each.refinements] for each in (reference, record)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", OWN_ORDER)
def test_rounding_is_all_that_another_order_of_sums_changes(name):
    """No `TOLERANCE` here, on one process as little as on two.

    Adam's first updates are g / |g|, also where g is no more than rounding, and a pruned weight's
    movement is the sum of just those; and once one position differs, training differs.
    """
    run, reference = OWN_ORDER[name]
    parity = compare(trained(*reference)[1], trained(*run)[1])
    assert parity.fraction_differing <= 1e-3, parity
    assert parity.mean_residual <= 1e-2, parity


@pytest.mark.parametrize("fault", ["offset", "start"])
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_a_shard_that_is_off_by_one_fails(layout, fault):
    """The planted fault: what the rank believes to hold, or what it reads, begins one too low."""
    moments = moments_of(run_on_ranks(2, train, layout, 2, True, 0.0, fault))
    parity = compare(trained(*REFERENCE)[1], moments)
    assert parity.fraction_differing > 100 * TOLERANCE
    with pytest.raises(AssertionError):
        check(parity)


def test_the_comparison_sees_one_weight_and_its_score():
    _, expected = trained(*REFERENCE)
    name = next(iter(expected[0]))
    before, after = expected[-2][name], expected[-1][name]
    kept = (before[MASK] == 1) & (after[MASK] == 1)
    best = before[SCORE].masked_fill(~kept, -1.0).argmax()
    found = copy.deepcopy(expected)
    found[-1][name][MASK, best] = 0.0
    parity = compare(expected, found)
    assert parity.num_differing == 1
    assert parity.farthest_score > 0.01
    found = copy.deepcopy(expected)
    found[-1][name][MOVEMENT, best] *= 1.01
    assert compare(expected, found).num_differing == 0
    assert compare(expected, found).largest_residual > TOLERANCE


def test_state_goes_from_zero2_to_one_process_to_zero3(tmp_path):
    folders = [tmp_path / name for name in ("zero2", "plain")]
    for folder in folders:
        folder.mkdir()
    two, one = map(str, folders)
    records = run_on_ranks(2, train, "zero2", 2, True, 0.0, None, two)
    saved = put_together(records, len(records[0].moments) - 1)
    single = put_together(run_on_ranks(1, reload, "plain", two, one), 0)
    divided = put_together(run_on_ranks(2, reload, "zero3", one, None), 0)
    for name, rows in saved.items():
        assert (rows[REGROWN] > 0).any()
        for found in (single, divided):
            for row in (MASK, MOVEMENT, REGROWN):
                bits = found[name][row].view(torch.int32), rows[row].view(torch.int32)
                assert torch.equal(*bits), (name, row)


@pytest.mark.parametrize("layout", ["zero2-bf16", "zero3-bf16"])
def test_bf16_weights_that_generate_keep_their_zeros(layout):
    (answer, used, masks), (other_answer, other_used, _) = run_on_ranks(2, generate, layout)
    assert answer == other_answer
    assert used.keys() == masks.keys()
    for name, weight in used.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, other_used[name])
        assert not weight[~masks[name]].any(), name
        assert (weight == 0).float().mean() == pytest.approx(LAST_SPARSITY, abs=0.01)


def test_the_table_is_printed(capsys):
    runs = {name: (run, REFERENCE) for name, run in LAYOUTS.items()} | OWN_ORDER
    rows = {
        name: compare(trained(*reference)[1], trained(*run)[1])
        for name, (run, reference) in runs.items()
    }
    lines = [f"{'against plain x1':34} masks differing   largest residual   mean residual"]
    for name, row in rows.items():
        residuals = f"{row.largest_residual:16.1e}   {row.mean_residual:13.1e}"
        lines.append(f"{name:34} {row.num_differing:15}   {residuals}")
    with capsys.disabled():
        print("", *lines, sep="\n")
    if "PARITY_JSON" in os.environ:
        facts = {"date": time.strftime("%Y-%m-%d"), "git_commit": git_commit()}
        facts |= {"versions": installed_versions(), "num_steps": NUM_STEPS, "tolerance": TOLERANCE}
        result = facts | {"layouts": {name: asdict(row) for name, row in rows.items()}}
        write_json(Path(os.environ["PARITY_JSON"]), result)
