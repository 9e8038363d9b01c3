"""What the trackers see of the engine: in the log, and in TensorBoard's own files by default."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.models.loading import load_tokenizer
from pipeline.sparsity.masks import pack_mask
from pipeline.sparsity.state import SparsityState
from pipeline.training.engine_metrics import EngineMetrics, movement_quantiles
from tests.unit.test_training import grpo_trainer


def state_of(movement, masks):
    return SparsityState({n: pack_mask(m) for n, m in masks.items()}, movement, {})


def test_quantiles_of_few_weights_are_exact():
    generator = torch.Generator().manual_seed(0)
    movement = {name: torch.randn(n, generator=generator) for name, n in (("a", 333), ("b", 501))}
    masks = {name: torch.rand(m.numel(), generator=generator) < 0.3 for name, m in movement.items()}
    found = movement_quantiles(state_of(movement, masks))
    sizes = torch.cat(list(movement.values())).abs()
    kept = torch.cat(list(masks.values()))
    for side, chosen in (("kept", sizes[kept]), ("pruned", sizes[~kept])):
        for name, quantile in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
            assert found[f"movement/{side}_{name}"] == pytest.approx(
                chosen.quantile(quantile).item()
            )
    assert len(found) == 6


def test_of_many_weights_an_even_sample_is_enough():
    movement = {"a": torch.linspace(-1, 0, 100_003), "b": torch.ones(7).bfloat16()}
    masks = {"a": torch.ones(100_003, dtype=torch.bool), "b": torch.ones(7, dtype=torch.bool)}
    found = movement_quantiles(state_of(movement, masks))
    assert found["movement/kept_p50"] == pytest.approx(0.5, abs=1e-3)
    assert "movement/pruned_p50" not in found
    assert movement_quantiles(SparsityState({}, {}, {})) == {}


def test_refinements_are_added_up_between_two_logs():
    metrics = EngineMetrics()
    for pruned, survived, accepted in ((5, 1, True), (7, 3, True), (100, 0, False)):
        entry = {"pruned": pruned, "regrown": 2, "survived": survived, "accepted": accepted}
        metrics.count_refinement(entry)
    with metrics.timed():
        sum(range(1000))
    metrics.steps = 2
    taken = metrics.take()
    assert taken.pop("engine/seconds_per_step") > 0
    assert taken == {"refine/pruned": 12, "refine/regrown": 4, "refine/survived": 3}
    assert metrics.take() == {}


def test_a_run_leaves_events_with_the_engines_metrics_beside_trls(tmp_path):
    folder = tmp_path / "grpo"
    trainer = grpo_trainer(
        load_tokenizer("bundled"), folder, teacher=None, weight=0.0,
        report_to="tensorboard", logging_steps=1, max_steps=2,
    )  # fmt: skip
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {
        "train/sparsity", "train/refine/pruned", "train/refine/regrown", "train/reward",
        "train/movement/kept_p50", "train/movement/pruned_p90", "train/engine/seconds_per_step",
    } <= names  # fmt: skip
    logged = [log["refine/pruned"] for log in trainer.state.log_history if "refine/pruned" in log]
    shown = [event.value for event in events.Scalars("train/refine/pruned")]
    assert shown == logged == [entry["pruned"] for entry in trainer.sparsity.sparsity.refinements]
