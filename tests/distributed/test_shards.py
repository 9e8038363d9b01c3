"""Shards of real DeepSpeed engines on real gloo ranks, in every layout the engine serves."""

import copy
import re

import pytest
import torch

from pipeline.sparsity.movement import MovementRule
from tests.distributed.layouts import LAYOUTS, SmallModel, matrices
from tests.distributed.shard_jobs import (
    RankView,
    check_tiling,
    join,
    mask,
    ramp,
    read,
    refuse,
    refuse_fsdp,
    skip,
    train,
    write,
)
from tests.distributed.workers import RankError, run_on_ranks

pytestmark = pytest.mark.distributed

SKIPPING = ("zero1", "zero2", "zero3")
RULE = MovementRule(half_life_steps=5.0)
CASES = [(name, 2) for name in LAYOUTS if name != "plain"] + [
    (name, 3) for name in ("ddp", "zero1", "zero2-bf16", "zero3", "zero3-bf16", "zero3-sub-groups")
]


@pytest.mark.parametrize(("layout", "world_size"), CASES)
def test_shards_tile_every_weight_and_read_its_values(layout, world_size):
    views = run_on_ranks(world_size, read, layout)
    check_tiling(views)
    assert list(views[0].whole) == list(matrices(SmallModel()))


@pytest.mark.parametrize(("layout", "world_size"), CASES)
def test_what_a_shard_writes_is_published_to_every_rank(layout, world_size):
    views = run_on_ranks(world_size, write, layout)
    model = SmallModel().to(views[0].whole["layers.0.weight"].dtype)
    for view in views:
        for position, (name, whole) in enumerate(view.whole.items()):
            expected = ramp(position, 0, whole.numel()).to(whole.dtype).reshape(whole.shape)
            assert torch.equal(whole, expected), name
            assert torch.equal(view.outputs, views[0].outputs)
            model.get_parameter(name).data.copy_(expected)


@pytest.mark.parametrize(("layout", "world_size"), CASES)
def test_zeros_stay_and_movement_is_that_of_one_process(layout, world_size):
    results = run_on_ranks(world_size, train, layout, 8, RULE)
    weights, movement = ([result[i] for result in results] for i in (0, 1))
    check_tiling(weights)
    for name, whole in weights[0].whole.items():
        zeros = whole == 0
        assert torch.equal(zeros, ~mask(name, whole.shape)), name
        assert not torch.signbit(whole[zeros]).any(), f"{name}: -0.0 is no zero to every reader"
    ((_, reference),) = run_on_ranks(1, train, "plain", 8, RULE)
    expected, found = join([reference]), join(movement)
    tolerance = 0.1 if "bf16" in layout else 1e-4
    for name, values in expected.items():
        error = (found[name] - values).norm() / values.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {float(error):.2e}"


def test_bf16_movement_does_not_depend_on_the_sharding():
    rule = MovementRule(half_life_steps=5.0, dtype=torch.bfloat16)
    one = join([run_on_ranks(1, train, "zero3", 1, rule)[0][1]])
    three = join([view for _, view in run_on_ranks(3, train, "zero3", 1, rule)])
    fp32 = join([run_on_ranks(1, train, "zero3", 1, RULE)[0][1]])
    for name, values in one.items():
        assert torch.equal(values.bfloat16().float(), values)
        same = (three[name] == values).float().mean()
        assert same > 0.9, "the same draw, up to gradients reduced in another order"
        torch.testing.assert_close(values, fp32[name], rtol=2**-6, atol=0.0)


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_a_view_shifted_by_one_is_noticed(layout):
    with pytest.raises(AssertionError):
        check_tiling(run_on_ranks(2, read, layout, 1))


def test_the_checker_notices_every_kind_of_shift():
    good = run_on_ranks(2, read, "zero3")
    check_tiling(good)
    for change in (
        lambda offset, values: (offset + 1, values),
        lambda offset, values: (offset, values[1:]),
        lambda offset, values: (offset, values[:-1]),
        lambda offset, values: (offset, values.roll(1)),
    ):
        views: list[RankView] = copy.deepcopy(good)
        name = "layers.0.weight"
        views[1].parts[name] = change(*views[1].parts[name])
        with pytest.raises(AssertionError, match=name):
            check_tiling(views)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name[:5] in SKIPPING])
def test_a_skipped_step_leaves_no_trace(layout):
    assert run_on_ranks(2, skip, layout) == [True, True]


@pytest.mark.parametrize(
    ("zero", "others", "message"),
    [
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            {},
            r"offload_optimizer.ratio: 0.5: .* set 1.0",
        ),
        ({"stage": 3, "zero_hpz_partition_size": 2}, {}, r"size: 2 \(hpZ\): .* set 1"),
        ({"stage": 0}, {"bf16": {"enabled": True}}, r"stage: 0: .* set 1, 2 or 3"),
    ],
    ids=["partial-offload", "hpz", "stage-0-bf16"],
)
def test_engines_that_cannot_be_served_are_refused(zero, others, message):
    for said in run_on_ranks(2, refuse, {"zero_optimization": zero, **others}):
        assert re.search(message, said)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_weight_that_is_not_trained_is_refused(stage):
    config = {"zero_optimization": {"stage": stage}}
    said = run_on_ranks(2, refuse, config, True)
    assert said == ["the optimizer does not train layers.3.weight"] * 2


def test_fsdp_is_refused():
    for said in run_on_ranks(2, refuse_fsdp):
        assert re.search(r"distributed_type: FSDP: .* set DEEPSPEED", said)


def test_a_rank_without_elements_has_no_shard():
    views = run_on_ranks(2, read, "zero3")
    assert "layers.5.weight" in views[0].parts
    assert "layers.5.weight" not in views[1].parts


def test_a_failing_rank_is_named_and_the_next_job_runs():
    with pytest.raises(RankError, match="no-such-layout"):
        run_on_ranks(2, read, "no-such-layout")
    check_tiling(run_on_ranks(2, read, "zero2"))
