"""The teacher term through TRL's own trainer, in each of its three places, by hand."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from pipeline.models.loading import load_tokenizer
from rewards.teacher_kl import merge_rest
from tests.unit.recorded_grpo import (
    CLIP,
    clipped,
    count_forwards,
    gradients,
    log_ratios_by_hand,
    score,
    trainer_with_teacher,
)
from tests.unit.tiny_models import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture
def build(tokenizer, tmp_path):
    return partial(trainer_with_teacher, tokenizer, tmp_path)


@pytest.fixture(scope="module")
def log_ratios(tokenizer):
    return log_ratios_by_hand(tokenizer)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_token_advantages_by_hand_for_groups_of_four(build, log_ratios, loss_type):
    trainer = build("advantage", loss_type=loss_type)
    found = trainer.acting_advantages(score(trainer))
    # First tokens 11 8 30 1 and 9 12 20 8: rewards 0 1 1 0 and 0 1 1 1.
    even, odd = 0.5 / (3**-0.5 + 1e-4), 0.25 / (0.5 + 1e-4)
    groups = [-even, even, even, -even, -3 * odd, odd, odd, odd]
    for row, (group, ratios) in enumerate(zip(groups, log_ratios, strict=True)):
        expected = [group - 0.3 * nats for nats in clipped(ratios)]
        assert found[row, : len(ratios)].tolist() == pytest.approx(expected, abs=1e-4)
        assert not found[row, len(ratios) :].any()
    assert max(abs(nats) for row in log_ratios for nats in row) > CLIP, "the clip acts"


def test_token_advantages_by_hand_for_groups_of_two(build, log_ratios):
    trainer = build("advantage", num_generations=2, per_device_train_batch_size=4)
    found = trainer.acting_advantages(score(trainer, 2))
    half = 0.5 / (0.5**0.5 + 1e-4)
    for row, (group, source) in enumerate(zip([-half, half] * 2, (0, 1, 4, 5), strict=True)):
        expected = [group - 0.3 * nats for nats in clipped(log_ratios[source])]
        assert found[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_scaling_rewards_leaves_the_token_term_as_it_is(build, log_ratios, scale):
    trainer = build("advantage", scale_rewards=scale)
    batch = score(trainer)
    term = trainer.acting_advantages(batch) - batch["advantages"][:, None]
    for row, ratios in enumerate(log_ratios):
        expected = [-0.3 * nats for nats in clipped(ratios)]
        assert term[row, : len(ratios)].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_sequence_reward_is_minus_the_mean_log_ratio_before_normalisation(build, log_ratios):
    trainer = build("reward", scale_rewards="none")
    found = score(trainer)["advantages"].view(2, 4)
    kl = torch.tensor([-sum(clipped(ratios)) / len(ratios) for ratios in log_ratios])
    rewards = torch.tensor([0.0, 1, 1, 0, 0, 1, 1, 1]) + 0.3 * kl
    expected = rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    logged = trainer._metrics["train"]
    assert logged["rewards/teacher_kl/mean"][0] == pytest.approx(kl.mean().item(), abs=1e-5)
    tokens = [nats for ratios in log_ratios for nats in ratios]
    assert logged["teacher_kl"][0] == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)


def test_in_a_dead_group_scaling_takes_the_weight_of_a_sequence_reward_away(build, log_ratios):
    def dead(completion_ids, **columns):
        return [0.0] * len(completion_ids)

    found = {}
    for scale in ("group", "none"):
        for weight in (0.2, 20.0):
            trainer = build("reward", weight, options={"reward_funcs": [dead]}, scale_rewards=scale)
            found[scale, weight] = score(trainer)["advantages"]
    torch.testing.assert_close(found["group", 0.2], found["group", 20.0], atol=5e-3, rtol=0)
    torch.testing.assert_close(100 * found["none", 0.2], found["none", 20.0])
    assert found["group", 0.2].view(2, 4).std(1).tolist() == pytest.approx([1.0, 1.0], abs=5e-3)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_is_grpos_plus_a_kl_over_the_vocabulary(build, tokenizer, direction, top_k):
    options = {"teacher_kl_direction": direction, "teacher_kl_top_k": top_k}
    trainer = build("loss", 0.4, options=options)
    trainer._student_head.max_logits = 4 * len(tokenizer)
    batch = score(trainer)
    present = batch["completion_mask"].bool()
    trainer.current_gradient_accumulation_steps = 1
    calls, loss = count_forwards(
        trainer.model, lambda: trainer._compute_loss(trainer.model, dict(batch))
    )
    assert calls == 1
    loss.backward()

    model, teacher = tiny(tokenizer, 0), tiny(tokenizer, 1)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    student, target = (
        m(ids, mask).logits[:, 5:9].log_softmax(-1)[present] for m in (model, teacher)
    )
    sampled = student.gather(-1, batch["completion_ids"][present][:, None]).squeeze(-1)
    advantages = batch["advantages"][:, None].expand_as(present)[present]
    if top_k is not None:
        at = target.topk(top_k).indices
        student, target = merge_rest(student, at), merge_rest(target, at)
    pair = (student, target) if direction == "forward" else (target, student)
    kl = F.kl_div(*pair, reduction="sum", log_target=True) / present.sum()
    policy = -(torch.exp(sampled - sampled.detach()) * advantages).sum() / present.sum()
    expected = policy + 0.4 * kl
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer._metrics["train"]["teacher_kl"] == [pytest.approx(kl.item(), rel=1e-5)]
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients(trainer)[name], weight.grad, atol=1e-6, rtol=1e-4)


def test_a_kl_in_the_loss_is_a_mean_over_the_tokens_of_an_optimizer_step(build):
    losses = {}
    for accumulation, per_generation in ((1, 1), (1, 2), (2, 2)):
        trainer = build("loss", gradient_accumulation_steps=2, steps_per_generation=per_generation)
        batch = score(trainer)
        batch["advantages"] = torch.zeros(8)
        batch["num_items_in_batch"] *= per_generation  # as if each micro-batch were this one
        trainer.current_gradient_accumulation_steps = accumulation
        losses[accumulation, per_generation] = trainer._compute_loss(trainer.model, batch).item()
    assert losses[1, 2] == pytest.approx(losses[1, 1])
    assert losses[2, 2] == pytest.approx(losses[1, 1] / 2)


def test_scores_of_the_chunked_head_are_trls(build, tokenizer):
    found = {}
    for place in ("advantage", "loss"):
        trainer = build(place, temperature=0.7)
        batch = score(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch)
        found[place] = trainer.last_scores
    mask = batch["completion_mask"]
    for ours, theirs in zip(found["loss"][:2], found["advantage"][:2], strict=True):
        torch.testing.assert_close(ours * mask, theirs * mask, atol=1e-5, rtol=1e-5)
