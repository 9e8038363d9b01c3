"""Groups sampled under two masks: order, reward, correction, and no trace left behind."""

import logging
from functools import partial

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.rules.idle_terms import MIN_DIFFERENCE
from rewards.acting import ACTS
from tests.unit.recorded_grpo import count_forwards
from tests.unit.tiny_models import tiny
from tests.unit.two_mask_trainers import (
    END_STEP,
    FINAL,
    GREEDY,
    PRESENT,
    log_probs,
    rows,
    schedule,
    sparser_model,
    two_mask_trainer,
)

RIGHT, WRONG = [11, 1], [12, 13, 1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture
def build(tokenizer, tmp_path):
    """Trainers that have been trained for two steps, so that there are moments and movement."""

    def trained(**arguments):
        trainer = two_mask_trainer(tokenizer, tmp_path, **arguments)
        trainer.train()
        trainer.model.train()
        trainer.scored.clear()
        trainer._metrics["train"].clear()
        return trainer

    return trained


@pytest.fixture
def replay(build, tokenizer):
    """Trainers that answer with RIGHT and WRONG completions."""

    def answers_right(completion, answer):
        return float(completion == tokenizer.decode(RIGHT, skip_special_tokens=True))

    return partial(build, verifier=answers_right)


def score(trainer, group_size=4):
    """A batch of two groups."""
    return trainer._generate_and_score_completions(rows(group_size))


def replayed(trainer, right, group_size):
    """The batch in which each completion is right or wrong as told."""
    trainer.recorded = [RIGHT if is_right else WRONG for is_right in right]
    return score(trainer, group_size)


@pytest.mark.parametrize("scale", ["none", "group"])
def test_advantages_of_a_group_of_two_by_hand(replay, scale):
    trainer = replay(
        weight=2.0, num_generations=2, per_device_train_batch_size=4, scale_rewards=scale
    )
    found = replayed(trainer, [1, 1, 0, 1], 2)["advantages"]
    # Right under sparsity 0.5 earns 1, under 0.75 it earns 1 + 2 x 0.25.
    halves = [0.25, 0.75]
    if scale == "group":
        halves = [half / (2**0.5 * half + 1e-4) for half in halves]
    expected = [-halves[0], halves[0], -halves[1], halves[1]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_advantages_of_a_group_of_four_by_hand(replay):
    trainer = replay(weight=2.0, scale_rewards="none")
    found = replayed(trainer, [1, 1, 0, 1, 0, 0, 1, 0], 4)["advantages"]
    expected = [0.0, 0.5, -1.0, 0.5, -0.25, -0.25, 0.75, -0.25]
    torch.testing.assert_close(found, torch.tensor(expected))
    logged = trainer._metrics["train"]
    assert logged["masks/present/reward"] == [pytest.approx((1 + 0 + 0 + 1) / 4)]
    assert logged["masks/sparser/reward"] == [pytest.approx((1.5 + 1.5 + 0 + 0) / 4)]
    assert logged["masks/present/sparsity"] == [pytest.approx(PRESENT)]
    assert logged["masks/sparser/sparsity"] == [pytest.approx(FINAL)]
    assert logged["rewards/sparsity/mean"] == [pytest.approx((0.25 + 0.25) / 8)]


@pytest.mark.parametrize("scale", ["none", "group"])
def test_the_bonus_acts_under_two_masks_and_is_inert_under_one(replay, scale):
    right = [1, 1, 0, 1, 0, 0, 1, 0]
    trainer = replay(scale_rewards=scale)
    replayed(trainer, right, 4)
    assert trainer.acting_terms.found["sparsity"] >= ACTS
    alone = replay(scale_rewards=scale, plan=schedule(final_sparsity=PRESENT))
    alone.acting_terms.found.clear()
    replayed(alone, right, 4)
    assert alone.acting_terms.found == {"correctness": 1.0, "sparsity": 0.0}


def test_every_second_completion_comes_from_the_sparser_mask(build, tokenizer):
    trainer = build(**GREEDY)
    batch, sparser = score(trainer), sparser_model(trainer)
    trainer.model.eval()
    different = 0
    for row, item in enumerate(rows()):
        prompt = torch.tensor([tokenizer(item["prompt"])["input_ids"]])
        answers = [
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=4,
            )[0, prompt.size(1) :].tolist()
            for model in (trainer.model, sparser)
        ]
        length = int(batch["completion_mask"][row].sum())
        assert batch["completion_ids"][row, :length].tolist() == answers[row % 2][:length]
        different += answers[0] != answers[1]
    assert different, "the masks answer differently"
    assert batch["is_sparser"].tolist() == [False, True] * 4
    expected = log_probs(sparser, batch) * batch["completion_mask"]
    found = batch["sparser_log_probs"] * batch["completion_mask"]
    torch.testing.assert_close(found[1::2], expected[1::2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_loss_weighs_a_token_by_its_ratio_to_the_mask_that_sampled_it(build, num_iterations):
    trainer = build(num_iterations=num_iterations)
    calls, batch = count_forwards(trainer.model, lambda: score(trainer))
    alone = sum(1 for _ in batch["completion_ids"][0])  # generation runs once per token
    assert calls <= 2 * alone + num_iterations, "one forward more, and TRL's where it has one"
    mask = batch["completion_mask"]
    trainer.current_gradient_accumulation_steps = 1
    epsilon = trainer.args.epsilon
    loss = trainer._compute_loss(trainer.model, dict(batch)).item()
    trainer.model.eval()
    present, sparser = log_probs(trainer.model, batch), log_probs(sparser_model(trainer), batch)
    ratio = torch.ones_like(present)
    ratio[1::2] = (present - sparser)[1::2].exp()
    advantages = batch["advantages"].unsqueeze(1)
    terms = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    assert loss == pytest.approx(-(terms * mask).sum().item() / mask.sum().item(), abs=1e-5)
    assert ((ratio - 1).abs() * mask)[1::2].max() > epsilon, "some token is clipped"


@pytest.mark.parametrize("place", ["advantage", "loss"])
def test_a_teacher_in_the_loss_sees_the_same_old_log_probs(tokenizer, tmp_path, place):
    options = {"teacher": tiny(tokenizer, 1), "teacher_kl_place": place, "teacher_kl_weight": 0.0}
    trainer = two_mask_trainer(tokenizer, tmp_path, options=options)
    trainer.train()
    trainer.model.train()
    batch = score(trainer)
    trainer.current_gradient_accumulation_steps = 1
    found = trainer._compute_loss(trainer.model, dict(batch))
    trainer.teacher_kl_place = None
    expected = trainer._compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def everything(trainer):
    """Name to a copy of all that training carries from step to step, random state included."""
    callback, found = trainer.sparsity, {"random": torch.get_rng_state()}
    found |= {f"weight {n}": p for n, p in trainer.model.named_parameters()}
    optimizer = callback.weights.optimizer
    for index, moments in enumerate(optimizer.state.values()):
        found |= {f"{key} {index}": value for key, value in moments.items()}
    found |= {f"mask {name}": bits for name, bits in callback.state.masks.items()}
    found |= {f"movement {name}": moved for name, moved in callback.state.movement.items()}
    for name, regrown in callback.state.regrown.items():
        found |= {f"regrown {name}": regrown.indices, f"regrown steps {name}": regrown.steps}
    return {name: torch.as_tensor(value).detach().clone() for name, value in found.items()}


def test_sampling_leaves_every_bit_as_it_was(build):
    trainer = build(plan=schedule(regrow_fraction=0.3, begin_step=1, every_steps=3))
    assert trainer.sparsity.sparsity.refinements[0]["regrown"] > 0
    before, seen = everything(trainer), {}
    score_as_it_is = trainer._student_log_probs

    def look(*batch):
        seen.update(everything(trainer))
        return score_as_it_is(*batch)

    trainer._student_log_probs = look
    batch = replayed(trainer, [1, 0] * 4, 4)
    after = everything(trainer)
    assert batch["is_sparser"].any()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    touched = {name.split()[0] for name in seen if not torch.equal(before[name], seen[name])}
    assert {"weight", "mask", "movement", "exp_avg", "regrown"} <= touched
    assert "random" not in touched


def test_without_a_sparser_mask_groups_come_from_the_present_one(build, caplog):
    with caplog.at_level(logging.INFO, "pipeline"):
        trainer = build(plan=schedule(begin_step=0, end_step=1), max_steps=3)
        batch = score(trainer)
    assert trainer.sparsity.measured == pytest.approx(FINAL)
    assert not {"is_sparser", "sparser_log_probs", "old_per_token_logps"} & set(batch)
    assert "masks/present/reward" not in trainer._metrics["train"]
    said = [record.message for record in caplog.records if "second mask" in record.message]
    assert said == [
        "grpo: step 1: no second mask to sample under (no refinement is left that makes it 0.01 "
        "sparser): groups come from the present one, and none earns a sparsity bonus"
    ]


def test_a_schedule_that_waited_still_has_a_second_mask_after_its_last_step(build):
    trainer = build()
    trainer.state.global_step = END_STEP + 4
    assert "is_sparser" not in score(trainer)
    trainer.sparsity.verified = "any"
    trainer.sparsity.sparsity.earlier = [{"step": END_STEP, "waited": 7.5, "halvings": 0}]
    batch = score(trainer)
    assert batch["is_sparser"].any()
    assert trainer._metrics["train"]["masks/sparser/sparsity"] == [pytest.approx(FINAL)]


def test_a_score_that_has_seen_nothing_yet_waits_a_step(tokenizer, tmp_path, caplog):
    trainer = two_mask_trainer(tokenizer, tmp_path)
    trainer.sparsity.sparsity.rule = type(trainer.sparsity.sparsity.rule)(
        scope="matrix", score="movement", movement_weight=0.0, protect_steps=0, min_density=0.0
    )
    with caplog.at_level(logging.INFO, "pipeline"):
        trainer.train()
    assert ["is_sparser" in batch for batch in trainer.scored] == [False, True]
    said = [record.message for record in caplog.records if "second mask" in record.message]
    assert len(said) == 1
    assert "needs movement and none was observed yet" in said[0]


def test_an_evaluation_samples_under_the_present_mask(build):
    trainer = build()
    trainer.model.eval()
    assert "is_sparser" not in score(trainer, 4)


def test_the_second_mask_is_the_next_that_is_sparser_by_enough():
    plan = schedule(begin_step=2, every_steps=2)  # due at 2, 4, 6, 8 and 10
    assert [plan.sparsity_at(step) for step in (2, 4)] == [PRESENT, FINAL - 0.25 * 0.75**3]
    assert plan.next_sparser(0, PRESENT + MIN_DIFFERENCE) == 4
    assert plan.next_sparser(3, PRESENT + MIN_DIFFERENCE) == 4
    assert plan.next_sparser(4, PRESENT + MIN_DIFFERENCE) == 6
    assert plan.next_sparser(4, FINAL - 1e-3) == END_STEP
    assert plan.next_sparser(4, FINAL + 1e-9) is None
    assert plan.next_sparser(END_STEP, 0.0) is None


def test_halves_that_are_none_are_refused(tokenizer, tmp_path):
    message = r"^grpo\.num_masks: 2: 3 completions on a rank .*, 3 of a prompt .*; set both to even"
    with pytest.raises(UserError, match=message):
        two_mask_trainer(tokenizer, tmp_path, num_generations=3, per_device_train_batch_size=3)
