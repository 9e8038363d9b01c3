"""Reward mixes of which the config alone shows that a term cannot act are refused."""

import re

import pytest

from pipeline.config import ConfigError
from pipeline.config_loading import load_config
from pipeline.reward_rules import matches_everything

STEPS = {"distill.max_steps": 9, "grpo.max_steps": 9}
TWO = {"rewards.functions": ["correctness", "my.module:length"]}
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
            {"grpo.temperature": 0},
            "grpo.temperature: 0: all completions of a prompt would be the same, and every reward "
            "with them; leave it out instead",
        ),
        ({"grpo.top_k": 1}, "grpo.top_k: 1: all completions"),
        ({"grpo.top_p": 0.0}, "grpo.top_p: 0.0: all completions"),
        ({"grpo.min_p": 1.0}, "grpo.min_p: 1.0: all completions"),
        (
            {"grpo.generation_kwargs": {"do_sample": False}},
            "grpo.generation_kwargs.do_sample: false: all completions of a prompt would be the "
            "same, and every reward with them; set true instead",
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
    ],
)
def test_a_pattern_is_refused_only_where_it_matches_every_text(pattern, is_certain):
    assert matches_everything(pattern) == is_certain
    if is_certain:
        assert all(re.search(pattern, text) for text in TEXTS)
