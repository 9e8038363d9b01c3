"""Reward mixes of which the config alone shows that a term cannot act are refused."""

import re

import pytest

from pipeline.config import ConfigError
from pipeline.config_loading import load_config
from pipeline.rules.idle_terms import matches_everything

STEPS = {"distill.max_steps": 9, "grpo.max_steps": 9}
TWO = {"rewards.functions": ["correctness", "my.module:length"]}
MASKS = {"grpo.num_masks": 2, "refine.start_sparsity": 0.5, "rewards.sparsity_weight": 2.0}
TEXTS = ["", "a", "\n", "42", "  x\n#### 7", "\u0663", "(", "a" * 50]


def faults(overrides):
    """The lines of the message, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, STEPS | overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            TWO | {"rewards.weights": [1, 0]},
            "rewards.weights[1]: 0.0: my.module:length would turn no advantage; set another "
            "weight, or take it out of rewards.functions, instead",
        ),
        (
            {"rewards.functions": ["correctness", "correctness"]},
            "rewards.functions: [correctness, correctness]: correctness stands there 2 times, and "
            "the second is a multiple of the first; name it once, with the sum of the weights, "
            "instead",
        ),
        (
            {"rewards.functions": ["correctness", "format"], "rewards.format_pattern": "[0-9]*"},
            "rewards.format_pattern: '[0-9]*': matches every completion, so format is the same for "
            r"all of a prompt; set one that some do not match, for example \A[0-9]+\Z, instead",
        ),
        (
            {"grpo.top_k": 1},
            "grpo.top_k: 1: all completions of a prompt would be the same, and every reward with "
            "them; leave it out instead",
        ),
        ({"grpo.top_p": 0.0}, "grpo.top_p: 0.0: all completions"),
        ({"grpo.min_p": 1.0}, "grpo.min_p: 1.0: all completions"),
        (
            {"grpo.generation_kwargs": {"do_sample": False}},
            "grpo.generation_kwargs.do_sample: false: all completions of a prompt would be the "
            "same, and every reward with them; set true instead",
        ),
        (
            MASKS | {"grpo.num_masks": 1},
            "rewards.sparsity_weight: 2.0: all completions of a prompt come from one mask, so it "
            "is correctness times a constant; set grpo.num_masks: 2",
        ),
        (
            MASKS | {"run.stages": ["prune", "distill"]},
            "rewards.sparsity_weight: 2.0: all completions of a prompt come from one mask",
        ),
        (
            MASKS | {"rewards.functions": ["my.module:length"]},
            "rewards.sparsity_weight: 2.0: right completions earn it, and rewards.functions does "
            "not ask which are right; add correctness there, or set 0, instead",
        ),
        (
            MASKS | {"grpo.use_vllm": True},
            "grpo.num_masks: 2: vLLM would sample both halves with the weights of one mask; set 1 "
            "instead",
        ),
        (
            MASKS | {"grpo.num_generations": 3, "grpo.per_device_train_batch_size": 12},
            "grpo.num_generations: 3: grpo.num_masks 2 samples one half of a group under either "
            "mask; set 4, or grpo.num_masks: 1, instead",
        ),
        (
            MASKS | {"refine.stages": ["distill"]},
            "grpo.num_masks: 2: refine.stages does not name grpo, whose mask stays; set 1 instead",
        ),
        (
            MASKS | {"refine.start_sparsity": None, "refine.regrow_fraction": 0.1},
            "grpo.num_masks: 2: training starts at prune.sparsity, 0.9, and no mask is sparser; "
            "set 1 instead",
        ),
        (
            MASKS | {"distill.max_steps": 30},
            "grpo.num_masks: 2: grpo begins after step 30, and there the schedule, which ends at "
            "step 23, has less than 0.01 of sparsity to go; set a later refine.end_step, "
            "refine.stages: [grpo], or num_masks 1, instead",
        ),
        (MASKS | {"refine.end_step": 9}, "grpo.num_masks: 2: grpo begins after step 9"),
        (  # 0.4 x (3 / 12)^3 is left, after the refinement at step 9
            MASKS | {"refine.end_step": 12, "refine.every_steps": 9},
            "grpo.num_masks: 2: grpo begins after step 9",
        ),
        (
            MASKS | {"refine.start_sparsity": 0.895, "refine.stages": ["grpo"]},
            "grpo.num_masks: 2: grpo begins after step 0",
        ),
    ],
)
def test_a_term_that_cannot_act_is_refused(overrides, line):
    (found,) = faults(overrides)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "overrides",
    [
        TWO | {"rewards.weights": [1, -0.5]},
        {"rewards.functions": ["format"], "rewards.format_pattern": r"\A[0-9]*\Z"},
        {"grpo.temperature": 0.1, "grpo.top_k": 0, "grpo.top_p": 1.0, "grpo.min_p": None},
        {"grpo.generation_kwargs": {"do_sample": True}},
        MASKS,
        MASKS | {"rewards.sparsity_weight": 0.0},
        MASKS | {"refine.end_step": 10},  # the last refinement before grpo is at step 0
        MASKS | {"refine.end_step": 10, "refine.begin_step": 9},
        MASKS | {"refine.end_step": 13, "refine.every_steps": 9},
        MASKS | {"refine.end_step": 9, "refine.verify": True},
        MASKS | {"grpo.num_masks": 1, "refine.verify": True},
        MASKS | {"distill.max_steps": 30, "refine.stages": ["grpo"]},
        MASKS | {"run.stages": ["grpo"]},
        MASKS | {"run.stages": ["prune"], "grpo.num_masks": 1},
    ],
)
def test_a_term_that_may_act_is_not(overrides):
    assert load_config(None, STEPS | overrides)


@pytest.mark.parametrize(
    ("pattern", "is_certain"),
    [
        ("", True),
        (".*", True),
        ("a*|b", True),
        ("(x+)?", True),
        ("(?i)a*", True),
        ("(?>a*)b?", True),
        (r"\s*", True),
        ("a+", False),
        ("^a*$", False),
        (r"\Aa*\Z", False),
        (r"\B", False),
        ("(?!a)", False),
        ("(?<!a)b*", False),
        ("(?=a)|", False),
        ("(", False),
        ("a{99999999999}", False),
    ],
)
def test_a_pattern_is_refused_only_where_it_matches_every_text(pattern, is_certain):
    assert matches_everything(pattern) == is_certain
    if is_certain:
        assert all(re.search(pattern, text) for text in TEXTS)
