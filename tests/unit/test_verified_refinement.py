"""Masks chosen by verified reward in a real training run."""

import inspect
import logging

import pytest
import torch
from trl import GRPOTrainer

from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import measured_sparsity
from pipeline.training.checkpoint import newest_whole_checkpoint
from pipeline.training.mask_choice import MaskReward
from tests.unit.probe_prompts import short_distillation
from tests.unit.verified_runs import verified_sparsity

NEVER = 99


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def run(tokenizer, tmp_path, *, reward=None, verified=True, arguments=None, **schedule):
    """Trains four steps at a rate that hardly moves the model."""
    values = {"max_steps": 4, "learning_rate": 1e-6, "logging_steps": 1} | (arguments or {})
    trainer = short_distillation(tokenizer, tmp_path / "out", **values)
    sparsity = verified_sparsity(
        trainer.model, tokenizer, tmp_path / "prune", reward=reward, verified=verified, **schedule
    )
    callback = trainer.add_sparsity(sparsity)
    trainer.train()
    return trainer, callback, sparsity.refinements


def everything(trainer, callback):
    """All that training left: weights, moments, masks, movement, random state."""
    found = [weight.detach().clone() for weight in trainer.model.parameters()]
    for weight in trainer.model.parameters():
        state = trainer.optimizer.state[weight]
        found += [state[key].clone() for key in ("exp_avg", "exp_avg_sq")]
    found += [*callback.state.masks.values(), *callback.state.movement.values()]
    found += [regrown.steps for regrown in callback.state.regrown.values()]
    return [*found, torch.get_rng_state()]


def test_masks_that_destroy_the_model_leave_the_run_as_if_nothing_had_been_due(
    tokenizer, tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        trainer, callback, decisions = run(tokenizer, tmp_path)
    untouched = run(tokenizer, tmp_path, verified=False, begin_step=NEVER, end_step=NEVER + 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(everything(trainer, callback), everything(*untouched[:2]), strict=True)
    )
    assert [entry["accepted"] for entry in decisions] == [True, False, False, False]
    assert [entry["waited"] for entry in decisions] == [0, 1, 2, 3]
    assert [entry["halvings"] for entry in decisions] == [0, 1, 2, 3]
    first, *refused = decisions
    assert first["reward_before"] == first["reward_after"] == 1.0
    for entry in refused:
        assert (entry["pruned"], entry["regrown"]) == (0, 0)
        assert entry["reward_after"] < 0.7 < entry["reward_before"]
    assert "step 2: mask kept at sparsity 0.0000, best proposal refused (1/2 of" in caplog.text
    assert "ends at sparsity 0.0000, short of prune.sparsity 0.9500" in caplog.text


def test_masks_that_hold_are_bound_and_the_schedule_is_on_time(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer, callback, decisions = run(
            tokenizer, tmp_path, final_sparsity=0.01, end_step=4, every_steps=1
        )
    assert [entry["accepted"] for entry in decisions] == [True] * 4
    assert decisions[-1]["waited"] == 0
    assert measured_sparsity(trainer.model)[0] == pytest.approx(0.01, abs=1e-3)
    assert callback.measured == pytest.approx(0.01, abs=1e-3)
    assert any(entry["regrown"] for entry in decisions), "regrowth goes with it"
    assert "step 4: mask bound at sparsity 0.0104 (full stride" in caplog.text
    assert "short of" not in caplog.text


def test_half_a_step_is_bound_where_the_whole_one_is_refused(tokenizer, tmp_path):
    trainer, callback, decisions = run(
        tokenizer, tmp_path, final_sparsity=0.09, end_step=9, every_steps=2
    )
    schedule = callback.sparsity.schedule
    assert [entry["step"] for entry in decisions] == [1, 3]
    assert decisions[1]["accepted"]
    assert decisions[1]["waited"] == 1
    assert decisions[1]["target"] == schedule.sparsity_at(2) < schedule.sparsity_at(3)
    assert measured_sparsity(trainer.model)[0] == pytest.approx(schedule.sparsity_at(2), abs=1e-3)


def test_the_tolerance_and_the_bonus_let_through_what_is_refused_without_them(tokenizer, tmp_path):
    for reward in (MaskReward(tolerance=0.999), MaskReward(sparsity_weight=1e4)):
        trainer, _, decisions = run(tokenizer, tmp_path, reward=reward)
        assert decisions[1]["accepted"], decisions
        assert measured_sparsity(trainer.model)[0] == pytest.approx(0.95, abs=1e-2)
        assert len(decisions) == 2, "the target is reached, and nothing is due any more"


def test_a_resumed_run_makes_the_decisions_of_the_straight_one(tokenizer, tmp_path):
    schedule = {"end_step": 6, "every_steps": 1, "final_sparsity": 0.6}
    ends = {}
    for name, stops in (("straight", (6,)), ("resumed", (3, 6))):
        for steps in stops:
            trainer = short_distillation(
                tokenizer,
                tmp_path / name,
                max_steps=steps,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                save_strategy="steps",
                save_steps=3,
            )
            sparsity = verified_sparsity(trainer.model, tokenizer, tmp_path / "prune", **schedule)
            checkpoint = newest_whole_checkpoint(tmp_path / name)
            if checkpoint is not None:
                sparsity.resume(checkpoint)
            callback = trainer.add_sparsity(sparsity)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends[name] = (everything(trainer, callback)[:-1], sparsity.refinements)
    straight, resumed = ends.values()
    assert straight[1] == resumed[1]
    assert {entry["accepted"] for entry in straight[1]} == {True, False}
    assert all(torch.equal(a, b) for a, b in zip(straight[0], resumed[0], strict=True))


def test_vllm_loads_the_weights_again_after_a_mask_has_changed(tokenizer, tmp_path):
    assert "self._last_loaded_step = -1" in inspect.getsource(GRPOTrainer.__init__)
    trainer = short_distillation(tokenizer, tmp_path / "out", learning_rate=1e-6, max_steps=1)
    trainer._last_loaded_step = 7
    trainer.add_sparsity(verified_sparsity(trainer.model, tokenizer, tmp_path / "prune"))
    trainer.train()
    assert trainer._last_loaded_step == -1
