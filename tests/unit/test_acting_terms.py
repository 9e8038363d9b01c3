"""Every reward term of every shipped config acts on a recorded batch, and a run says so."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config_loading import load_config
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.threshold import masks_by_score
from pipeline.stages.grpo import as_dataset, reward_mix, teacher_options
from pipeline.stages.inputs import open_task
from pipeline.training.acting_terms import MAX_BATCHES
from pipeline.training.arguments import grpo_arguments
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from rewards.acting import ACTS, influences
from rewards.teacher_kl import teacher_advantages
from tests.unit.recorded_grpo import (
    CLIP,
    PROMPTS,
    log_ratios_by_hand,
    starts_even,
    trainer_with_teacher,
)

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    if "grpo" in yaml.safe_load(path.read_text())
]
NUM_CONFIGS = 5
SPARSITY = 0.5
"""By magnitude, at which the bundled model answers some prompts right and others wrong."""
NUM_PROMPTS, GROUP_SIZE = 16, 8

BUNDLED = {
    "student.path": "bundled",
    "teacher.path": "bundled",
    "teacher.dtype": "float32",
    "task.path": "bundled",
    "task.subset": None,
    "task.prompt_column": "prompt",
    "task.answer_column": "answer",
    "task.instruction": "",
    "task.num_train": NUM_PROMPTS,
}
"""What a config that names models on the Hub is tried with; the rewards stay its own."""


def test_every_config_that_trains_with_rewards_is_looked_at():
    assert len(CONFIGS) == NUM_CONFIGS


@pytest.fixture(scope="module")
def student():
    """The bundled model, pruned at once."""
    model = load_model("bundled")
    weights = prunable_weights(model)
    magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
    for name, mask in masks_by_score(magnitudes, SPARSITY, "matrix").items():
        weights[name].data *= mask
    return model


@pytest.fixture(scope="module")
def completions(student):
    """Prompt to what the student answers, sampled once."""
    config = load_config(CONFIGS[0], BUNDLED)
    inputs = open_task(config)
    torch.manual_seed(0)
    found = {}
    for row in inputs.task.train:
        prompt = torch.tensor([inputs.encode(row.prompt)] * GROUP_SIZE)
        sampled = student.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=8
        )
        end = inputs.tokenizer.eos_token_id
        found[tuple(prompt[0].tolist())] = [
            ids[: ids.index(end) + 1 if end in ids else None]
            for ids in sampled[:, prompt.size(1) :].tolist()
        ]
    return found


def trainer_of(config, model, completions, folder):
    """The trainer of the stage, which answers with the recorded completions."""
    inputs = open_task(config)
    functions, weights = reward_mix(config, inputs.verifier)
    trainer = TeacherGRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=grpo_arguments(config, folder, weights),
        train_dataset=as_dataset(inputs.task.train, inputs),
        processing_class=inputs.tokenizer,
        teacher=load_model("bundled") if config.rewards.teacher_kl_weight > 0 else None,
        **teacher_options(config),
    )
    assert trainer.num_generations == GROUP_SIZE
    trainer._generate_single_turn = lambda prompt_ids, *_: (
        [completions[tuple(ids)][row % GROUP_SIZE] for row, ids in enumerate(prompt_ids)],
        None,
    )
    trainer.model.train()
    rows = as_dataset(inputs.task.train, inputs)
    return trainer, [row for row in rows for _ in range(GROUP_SIZE)]


def go_through(trainer, rows, num_batches=1):
    """Generation batches as TRL samples them, cuts them up and hands them to the loss."""
    size = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    with torch.no_grad():
        for _ in range(num_batches * trainer.args.steps_per_generation):
            trainer._compute_loss(trainer.model, trainer._prepare_inputs(rows[:size]))
            trainer._step += 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_term_of_a_shipped_config_acts(path, student, completions, tmp_path, caplog):
    config = load_config(path, BUNDLED)
    trainer, rows = trainer_of(config, student, completions, tmp_path)
    with caplog.at_level(logging.INFO, "pipeline"):
        go_through(trainer, rows)
    terms = list(config.rewards.functions)
    if config.rewards.teacher_kl_weight > 0:
        assert config.rewards.teacher_kl_place != "loss", "that is no part of the advantages"
        terms.append("teacher_kl")
    found = trainer.acting_terms.found
    assert list(found) == terms
    assert min(found.values()) >= ACTS, found
    said = ", ".join(f"{name} {influence:.2g}" for name, influence in found.items())
    assert [r.message for r in caplog.records] == [f"grpo: each term acts: {said}"]


# What a run measures, on completions recorded by hand.

ROWS = [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]


def lengths(completion_ids, **columns):
    """Reward: a tenth per token."""
    return [0.1 * len(ids) for ids in completion_ids]


@pytest.fixture
def build(tmp_path):
    return partial(trainer_with_teacher, load_tokenizer("bundled"), tmp_path)


def test_micro_batches_in_trls_order_give_what_the_batch_in_order_gives(build):
    trainer = build(
        "advantage",
        options={"reward_funcs": [starts_even, lengths]},
        reward_weights=[1.0, -0.5],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    go_through(trainer, ROWS)
    ratios = [torch.tensor(row) for row in log_ratios_by_hand(load_tokenizer("bundled"))]
    padded = torch.nn.utils.rnn.pad_sequence(ratios, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in ratios], batch_first=True)
    term = teacher_advantages(padded, torch.zeros_like(padded), mask, weight=0.3, clip=CLIP)
    expected = influences(
        {"starts_even": torch.tensor([0.0, 1, 1, 0, 0, 1, 1, 1]), "lengths": 0.1 * mask.sum(1)},
        {"starts_even": 1.0, "lengths": -0.5},
        4,
        mask,
        {"teacher_kl": term},
    )
    assert trainer.acting_terms.found == pytest.approx(expected, rel=1e-4)
    assert trainer.acting_terms.is_done


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_term_in_the_rewards_counts_and_one_in_the_loss_does_not(build, place):
    trainer = build(place)
    go_through(trainer, ROWS)
    names = ["starts_even", "teacher_kl"] if place == "reward" else ["starts_even"]
    assert list(trainer.acting_terms.found) == names


def messages(trainer, caplog, num_batches=MAX_BATCHES + 2):
    """What is said about so many batches."""
    with caplog.at_level(logging.INFO, "pipeline"):
        go_through(trainer, ROWS, num_batches)
    return [(record.levelname, record.message) for record in caplog.records]


def test_a_term_that_never_acts_is_named_once_and_two_of_one_name_are_told_apart(build, caplog):
    def constant(completion_ids, **columns):
        return [0.7] * len(completion_ids)

    constant.__name__ = "starts_even"
    trainer = build("advantage", options={"reward_funcs": [starts_even, constant]})
    ((level, said),) = messages(trainer, caplog)
    assert level == "WARNING"
    assert said.startswith("grpo: starts_even 2 ")
    assert " turned no advantage by as much as 0.001 " in said
    assert said.count("starts_even 1 ") == 1
    assert "teacher_kl" in said


def test_batches_without_an_advantage_say_nothing_of_the_terms(build, caplog):
    def alike(completion_ids, **columns):
        return [0.0] * len(completion_ids)

    trainer = build("loss", options={"reward_funcs": [alike]})
    ((level, said),) = messages(trainer, caplog)
    assert level == "INFO"
    assert "is unknown: no group of the first 10 batches had an advantage" in said


def test_the_wait_for_a_batch_in_which_a_term_acts_ends_with_it(build, caplog):
    calls = []

    def late(completion_ids, **columns):
        calls.append(1)
        return lengths(completion_ids) if len(calls) == 3 else [None] * len(completion_ids)

    trainer = build("loss", options={"reward_funcs": [starts_even, late]})
    ((level, said),) = messages(trainer, caplog)
    assert level == "INFO"
    assert said.startswith("grpo: each term acts: starts_even ")
    assert trainer.acting_terms._num_batches == 3
