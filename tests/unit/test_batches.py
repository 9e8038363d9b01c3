"""Batch arithmetic: what TRL would refuse is refused, and every number that is offered works."""

import itertools
import re

import pytest
from trl import GRPOConfig

from pipeline.config import ConfigError
from pipeline.config_loading import load_config
from pipeline.rules.batches import DEFAULTS, group_faults


def is_accepted(values, num_ranks):
    """TRL's rules, as GRPOConfig.__post_init__ states them."""
    filled = DEFAULTS | values
    at_once = filled["per_device_train_batch_size"] * num_ranks
    whole = filled["generation_batch_size"]
    if whole is None:
        steps = filled["steps_per_generation"] or filled["gradient_accumulation_steps"]
        whole = at_once * steps
    return whole % at_once == 0 and whole % filled["num_generations"] == 0


CASES = [
    {
        "per_device_train_batch_size": per_device,
        "num_generations": group,
        **({} if steps is None else {key: steps}),
    }
    for per_device, group in itertools.product((1, 3, 6, 8), (2, 7, 8))
    for key, steps in (
        (None, None),
        ("gradient_accumulation_steps", 4),
        ("steps_per_generation", 5),
        ("generation_batch_size", 20),
    )
]


@pytest.mark.parametrize("num_ranks", [1, 2, 6])
def test_what_trl_refuses_is_refused_with_numbers_that_it_takes(num_ranks):
    seen = 0
    for values in CASES:
        faults = list(group_faults(values, num_ranks))
        assert len(faults) == (not is_accepted(values, num_ranks)), values
        for fault in faults:
            remedy = fault.remedy.removeprefix("set ")
            if "generation_batch_size" in values:
                remedy = f"grpo.generation_batch_size {remedy}"
            offers = re.findall(r"grpo\.(\w+) (\d+)(?: or (\d+))?", remedy)
            assert offers
            for key, *numbers in offers:
                for number in filter(None, numbers):
                    assert is_accepted(values | {key: int(number)}, num_ranks), (fault, key, number)
                    seen += 1
    assert seen > 20


def test_the_message(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    overrides = {"grpo.per_device_train_batch_size": 64, "grpo.num_generations": 7}
    stages = {"run.stages": ["grpo"], "grpo.max_steps": 9}
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides | stages)
    assert str(caught.value).splitlines()[1:] == [
        "  grpo.num_generations: 7: grpo.per_device_train_batch_size 64 x 2 ranks x "
        "grpo.gradient_accumulation_steps 1 = 128 completions are no whole number of groups; set "
        "grpo.num_generations 4 or 8, or grpo.per_device_train_batch_size 63 or 70, or "
        "grpo.gradient_accumulation_steps 7, instead"
    ]


def test_two_ways_to_say_it_at_once():
    (fault,) = group_faults({"steps_per_generation": 2, "generation_batch_size": 16}, 1)
    assert fault.remedy == "leave one of them out"


def test_the_rules_and_defaults_are_trls(tmp_path):
    built = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for key, value in DEFAULTS.items():
        assert value is None or getattr(built, key) == value
    for values in CASES:
        try:
            GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **values)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == is_accepted(values, 1), values
