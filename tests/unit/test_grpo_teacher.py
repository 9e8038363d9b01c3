"""The teacher term through TRL's trainer: signs, zeros, padding, clipping, cost, refusals."""

from functools import partial

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.training import grpo_trainer
from tests.unit.recorded_grpo import (
    clipped,
    count_forwards,
    gradients,
    log_ratios_by_hand,
    recorded_trainer,
    score,
    starts_even,
    trainer_with_teacher,
)
from tests.unit.unchecked import Unchecked

PLACES = ("advantage", "reward", "loss")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture
def build(tokenizer, tmp_path):
    return partial(trainer_with_teacher, tokenizer, tmp_path)


@pytest.fixture(scope="module")
def log_ratios(tokenizer):
    return log_ratios_by_hand(tokenizer)


def test_a_token_the_teacher_likes_more_gets_a_higher_advantage(build):
    trainer = build("advantage")
    batch = score(trainer)
    before = trainer.acting_advantages(dict(batch))
    liked = batch["teacher_log_probs"].clone()
    liked[1, 1] += 0.1  # log ratio -0.1 against the recorded one: inside the clip
    change = trainer.acting_advantages(batch | {"teacher_log_probs": liked}) - before
    assert change[1, 1] == pytest.approx(0.03, abs=1e-5)
    assert change.abs().sum() == pytest.approx(0.03, abs=1e-4)


def test_a_step_on_the_reward_or_the_loss_goes_towards_the_teacher(build, log_ratios):
    """Descending the loss lowers the KL; the completion the teacher likes best gains most."""
    trainer = build("loss", 1.0, options={"reward_funcs": [lambda prompts, **_: [0.0] * 8]})
    batch = score(trainer)
    trainer.current_gradient_accumulation_steps = 1
    losses = []
    for _ in range(2):
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.item())
        for weight in trainer.model.parameters():
            weight.data -= 1e-2 * weight.grad
            weight.grad = None
    assert losses[1] < losses[0]
    trainer = build("reward", 1.0, options={"reward_funcs": [lambda prompts, **_: [0.0] * 8]})
    advantages = score(trainer)["advantages"].view(2, 4)
    means = torch.tensor([sum(clipped(row)) / len(row) for row in log_ratios]).view(2, 4)
    assert [row.argmax() for row in advantages] == [row.argmin() for row in means]


@pytest.mark.parametrize(
    ("place", "top_k"), [("advantage", None), ("reward", None), ("loss", None), ("loss", 3)]
)
def test_a_teacher_equal_to_the_student_changes_nothing(build, tokenizer, tmp_path, place, top_k):
    same = build(place, 5.0, teacher_seed=0, options={"teacher_kl_top_k": top_k})
    alone = recorded_trainer(tokenizer, tmp_path, teacher=None)
    for trainer in (same, alone):
        trainer.acting_advantages(score(trainer))
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(gradients(same)[name], gradient, atol=2e-6, rtol=1e-4)
    assert same._metrics["train"]["teacher_kl"][0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("place", ["advantage", "loss"])
def test_padding_and_what_follows_the_end_contribute_nothing_but_the_end_token_does(build, place):
    trainer = build(place, options={"teacher_kl_top_k": 3})
    batch = score(trainer)
    key = "teacher_log_probs" if place == "advantage" else "teacher_targets"
    trainer.acting_advantages(dict(batch))
    clean = gradients(trainer)
    behind = batch["completion_mask"] == 0

    def changed(**tensors):
        trainer.model.zero_grad()
        trainer.acting_advantages(batch | tensors)
        return any(not torch.equal(g, clean[name]) for name, g in gradients(trainer).items())

    assert not changed(
        completion_ids=batch["completion_ids"].masked_fill(behind, 33),
        **{
            key: batch[key].masked_fill(
                behind.view(*behind.shape, *[1] * (batch[key].dim() - 2)), 7
            )
        },
    )
    assert batch["completion_ids"][0, 2] == 1, "the end token"
    targets = batch[key].clone()
    targets[0, 2] = targets[0, 2] * 0.5
    assert changed(**{key: targets})


def test_a_reward_sees_the_end_token_and_nothing_behind_it(build, log_ratios):
    """The fourth completion is the end token alone; the eighth has none."""
    trainer = build("reward", scale_rewards="none", options={"reward_funcs": [starts_even]})
    score(trainer)
    found = trainer._logs["rewards"]["teacher_kl"]
    assert found[3] == pytest.approx(-clipped(log_ratios[3])[0], abs=1e-5)
    assert found[7] == pytest.approx(-sum(clipped(log_ratios[7])) / 4, abs=1e-5)


@pytest.mark.parametrize("place", ["advantage", "loss"])
def test_beyond_the_first_pass_the_sign_of_the_sum_decides_what_is_clipped(build, place):
    trainer = build(place, 1.0)
    batch = score(trainer)
    whole = trainer.acting_advantages(dict(batch))  # ratio 1: nothing is clipped
    present = batch["completion_mask"].bool()
    student = trainer.last_scores[0].detach()
    for ratio in (1.5, 0.5):
        old = {"old_per_token_logps": student - torch.tensor(ratio).log()}
        found = trainer.acting_advantages(batch | old)
        stopped = whole > 0 if ratio > 1 else whole < 0
        expected = torch.where(stopped, 0.0, ratio * whole)
        torch.testing.assert_close(found[present], expected[present], atol=1e-4, rtol=1e-4)
    if place == "advantage":
        against = torch.sign(whole) != torch.sign(batch["advantages"][:, None])
        assert (against & present).any(), "some token's sign is the teacher's"


def test_a_kl_in_the_loss_flows_where_the_policy_is_clipped(build):
    trainer = build("loss", 1.0, options={"reward_funcs": [starts_even]})
    batch = score(trainer)
    trainer.acting_advantages(dict(batch) | {"advantages": torch.zeros(8)})
    kl_alone = gradients(trainer)
    trainer.model.zero_grad()
    clipped_away = {
        "advantages": torch.ones(8),
        "old_per_token_logps": trainer.last_scores[0].detach() - 1.0,
    }
    trainer.acting_advantages(batch | clipped_away)
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient, kl_alone[name], atol=1e-6, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-3 for gradient in kl_alone.values())


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_student_runs_once_more_only_where_trl_has_no_log_probs(
    build, tokenizer, tmp_path, num_iterations
):
    alone = recorded_trainer(tokenizer, tmp_path, teacher=None, num_iterations=num_iterations)
    trls, _ = count_forwards(alone.model, lambda: score(alone))
    assert trls == num_iterations - 1
    for place, more in (("advantage", 0), ("loss", 0), ("reward", 2 - num_iterations)):
        trainer = build(place, num_iterations=num_iterations)
        ours, _ = count_forwards(trainer.model, lambda trainer=trainer: score(trainer))
        assert ours == trls + more, place
        again, _ = count_forwards(
            trainer.model, lambda trainer=trainer: trainer.acting_advantages(score(trainer))
        )
        assert again == ours + 1, f"{place}: one forward in the loss"


def test_a_reward_is_the_same_whoever_computed_the_log_probs(build):
    found = {}
    for name, arguments in (
        ("ours", {}),
        ("trls", {"num_iterations": 2}),
        ("masked", {"num_iterations": 2, "mask_truncated_completions": True}),
    ):
        trainer = build("reward", **arguments)
        score(trainer)
        found[name] = list(trainer._logs["rewards"]["teacher_kl"])
    assert found["trls"] == pytest.approx(found["ours"], abs=1e-5)
    assert found["masked"] == pytest.approx(found["ours"], abs=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_training_goes_through_trl(build, place):
    trainer = build(place, max_steps=2, learning_rate=1e-2, gradient_accumulation_steps=2)
    trainer.sparsity = trainer.skipped_steps = Unchecked()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = [entry["teacher_kl"] for entry in trainer.state.log_history if "teacher_kl" in entry]
    assert len(logged) == 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(weight.grad is None for weight in trainer.teacher.parameters())
    assert not trainer.teacher.training


def test_a_teacher_on_the_cpu_says_the_same(build):
    batches = [
        score(build("advantage", options={"teacher_placement": placement}))
        for placement in ("device", "cpu")
    ]
    assert torch.equal(batches[0]["teacher_log_probs"], batches[1]["teacher_log_probs"])


def test_zero3_needs_zero3(build):
    with pytest.raises(UserError, match=r"^teacher\.placement: zero3: .*set device or cpu instead"):
        build("advantage", options={"teacher_placement": "zero3"})


def test_targets_that_fill_the_memory_and_an_fp32_head_are_refused(build, monkeypatch):
    with pytest.raises(UserError, match=r"^grpo\.cast_lm_head_to_fp32: true: "):
        build("loss", cast_lm_head_to_fp32=True)
    monkeypatch.setattr(grpo_trainer, "MAX_TARGET_BYTES", 8 * 4 * 67 * 4 - 1)
    message = r"^rewards\.teacher_kl_top_k: null: .*32 tokens x 67 entries.*set 64 instead"
    with pytest.raises(UserError, match=message):
        build("loss")
    build("loss", options={"teacher_kl_top_k": 64})
    build("advantage")
