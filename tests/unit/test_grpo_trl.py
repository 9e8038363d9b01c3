"""What the GRPO trainer leans on in TRL. If a test fails, TRL has changed: read its diff."""

import inspect
from functools import partial

import pytest
import torch
from trl import GRPOTrainer
from trl.models import prepare_deepspeed

from pipeline.models.loading import load_tokenizer
from rewards.acting import group_advantages
from tests.unit.recorded_grpo import (
    COMPLETIONS,
    PROMPTS,
    recorded_trainer,
    score,
    starts_even,
    trainer_with_teacher,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture
def build(tokenizer, tmp_path):
    return partial(trainer_with_teacher, tokenizer, tmp_path)


def test_trl_still_has_the_private_methods_this_trainer_leans_on():
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_tokenize_prompts": ["self", "prompts"],
        "_generate_single_turn": [
            "self", "prompt_ids", "images", "multimodal_fields", "num_generations",
            "has_tool_images",
        ],
    }  # fmt: skip
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, name
    scores = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert list(scores)[:6] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    ]  # fmt: skip
    assert list(inspect.signature(prepare_deepspeed).parameters) == ["model", "accelerator"]


def test_trl_still_gives_the_batch_and_the_attributes_this_trainer_reads(tokenizer, tmp_path):
    trainer = recorded_trainer(tokenizer, tmp_path, teacher=None, num_iterations=2)
    batch = score(trainer)
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    assert shapes == {
        "prompt_ids": (8, 6),
        "prompt_mask": (8, 6),
        "completion_ids": (8, 4),
        "completion_mask": (8, 4),
        "advantages": (8,),
        "num_items_in_batch": (),
        "old_per_token_logps": (8, 4),
    }
    lengths = [len(ids) for prompt in PROMPTS for ids in COMPLETIONS[prompt]]
    assert batch["completion_mask"].sum(1).tolist() == lengths
    assert batch["num_items_in_batch"] == sum(lengths)
    assert batch["prompt_mask"][0].tolist() == [0, 0, 1, 1, 1, 1], "prompts are padded on the left"
    trainer.current_gradient_accumulation_steps = 1
    given = {}
    original = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        given.update(kwargs, num_positional=len(args)) or original(*args, **kwargs)
    )
    trainer._compute_loss(trainer.model, batch)
    assert given["num_positional"] == 4
    assert given["compute_entropy"]
    assert trainer.temperature == 1.0
    assert trainer.reward_weights.tolist() == [1.0]
    assert trainer.max_completion_length == 4
    assert trainer.mask_truncated_completions is False
    assert trainer.args.steps_per_generation == 1
    assert trainer._metrics["train"]["reward"]
    assert trainer._tokenizer.pad_token_id == 0
    assert trainer.reward_func_names == ["starts_even"]
    assert trainer.scale_rewards == "group"
    assert trainer.multi_objective_aggregation == "sum_then_normalize"
    assert trainer.num_generations == 4


def test_trl_has_old_log_probs_only_where_the_docstring_says(build):
    for arguments, has in (
        ({}, False),
        ({"num_iterations": 2}, True),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, False),
        ({"gradient_accumulation_steps": 1, "steps_per_generation": 2}, True),
    ):
        trainer = build("advantage", **({"per_device_train_batch_size": 4} | arguments))
        assert ("old_per_token_logps" in score(trainer)) == has, arguments


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [2, 4])
def test_group_advantages_are_those_of_trl(build, group_size, scale):
    def length(completion_ids, **columns):
        return [0.1 * len(ids) for ids in completion_ids]

    trainer = build(
        "advantage",
        options={"reward_funcs": [starts_even, length]},
        reward_weights=[1.0, -0.5],
        num_generations=group_size,
        per_device_train_batch_size=2 * group_size,
        scale_rewards=scale,
    )
    batch = score(trainer, group_size)
    chosen = [ids for prompt in PROMPTS for ids in COMPLETIONS[prompt][:group_size]]
    rewards = torch.tensor([starts_even(chosen), length(chosen)]).T
    found = group_advantages(rewards, [1.0, -0.5], group_size, scale)
    torch.testing.assert_close(batch["advantages"], found)


def test_trl_reads_old_log_probs_after_it_has_scored_and_rewards_after_they_are_gathered(build):
    trainer = build("advantage", 0.0, scale_rewards="none")
    as_trl_gathers = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: as_trl_gathers(*args).mul_(3.0)
    batch = score(trainer)
    assert batch["advantages"].abs().max() == pytest.approx(3 * 0.75)
    as_trl_scores = trainer._get_per_token_logps_and_entropies
    trainer.current_gradient_accumulation_steps = 1

    def fill_in(*args, **kwargs):
        scores = as_trl_scores(*args, **kwargs)
        trainer._loss_inputs["old_per_token_logps"] = scores[0].detach() - 0.1
        return scores

    loss = trainer._compute_loss(trainer.model, dict(batch))
    trainer._get_per_token_logps_and_entropies = fill_in
    inside = trainer._compute_loss(trainer.model, dict(batch))
    assert inside.item() == pytest.approx(loss.item() * torch.tensor(0.1).exp().item(), rel=1e-4)


def test_trl_shuffles_what_we_add_with_the_rest_and_cuts_it_up(build):
    trainer = build("advantage", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]
    lengths = torch.tensor([len(ids) for prompt in PROMPTS for ids in COMPLETIONS[prompt]])
    seen = []
    for _ in range(4):
        batch = trainer._prepare_inputs(rows)
        trainer._step += 1
        assert batch["completion_mask"].sum(1).tolist() == lengths[batch["row"]].tolist()
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(8))
    assert seen != sorted(seen)
