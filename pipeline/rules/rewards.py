"""Rules on the reward mix: a reward and its settings, a term and the loss it stands in."""

import re
from collections.abc import Iterator

from pipeline.config import Config
from pipeline.rules.fault import Fault

NO_PATTERN = (re.error, OverflowError, RecursionError)
"""What `re.compile` raises: `(`, `a{99999999999}`, ten thousand brackets."""


def format_faults(config: Config) -> Iterator[Fault]:
    """The reward `format` and its pattern come together."""
    pattern, is_used = config.rewards.format_pattern, "format" in config.rewards.functions
    if is_used != (pattern is not None):
        yield Fault(
            "rewards.format_pattern",
            pattern,
            f"rewards.functions {'names' if is_used else 'does not name'} format",
            "set a regular expression instead" if is_used else "set null, or add format there",
            ("rewards.functions",),
        )
    try:
        re.compile(pattern or "")
    except NO_PATTERN as error:
        yield Fault(
            "rewards.format_pattern",
            pattern,
            f"no regular expression ({error})",
            "mend it; https://docs.python.org/3/library/re.html says what it may hold",
        )


def teacher_term_faults(config: Config) -> Iterator[Fault]:
    """A per-token teacher term needs a loss that weighs tokens; some keys belong to one place."""
    rewards = config.rewards
    for name, usual in (("teacher_kl_direction", "forward"), ("teacher_kl_top_k", None)):
        value = getattr(rewards, name)
        if value != usual and rewards.teacher_kl_place != "loss":
            yield Fault(
                f"rewards.{name}",
                value,
                f"belongs to rewards.teacher_kl_place loss, and that is {rewards.teacher_kl_place}",
                f"set {'null' if usual is None else usual}, or teacher_kl_place: loss, instead",
                ("rewards.teacher_kl_place",),
            )
    if rewards.teacher_kl_weight == 0 or rewards.teacher_kl_place != "advantage":
        return
    for key, value, token_wise in (
        ("loss_type", "vespo", "dapo"),
        ("loss_type", "luspo", "dapo"),
        ("importance_sampling_level", "sequence", "token"),
    ):
        if config.grpo.trl_values.get(key) == value:
            yield Fault(
                f"grpo.{key}",
                value,
                "weighs whole sequences, but rewards.teacher_kl_weight, "
                f"{config.rewards.teacher_kl_weight}, is a term per token",
                f"set {token_wise}, or rewards.teacher_kl_weight: 0, instead",
                ("rewards.teacher_kl_weight",),
            )
