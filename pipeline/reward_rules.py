r"""Which terms of a reward mix cannot act, as far as the config alone shows it.

GRPO subtracts the mean of a group. So a term does nothing that has weight 0, that is another term
again (then it only changes that one's weight), or that has one value for all completions of a
prompt: a pattern that matches every text, or completions that are all the same text. What only a
batch shows, `pipeline/training/acting_terms.py` measures.

A pattern matches every text if it matches the empty one and has nothing that looks around itself
(`^ $ \A \Z \b \B`, look-ahead, look-behind): then the empty match at the beginning is always there.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.config import Config

LOOKS_AROUND = re.compile(r"[\^$]|\\[AZbB]|\(\?<?[=!]")

GREEDY = {
    "temperature": lambda value: value == 0,
    "top_k": lambda value: value == 1,
    "top_p": lambda value: value == 0,
    "min_p": lambda value: value >= 1,
    "do_sample": lambda value: value is False,
}
"""Keys of sampling to values that leave one possible next token."""


class Contradiction(NamedTuple):
    """The parts of a `Fault`, see `config_rules.py`."""

    key: str
    value: Any
    why: str
    remedy: str
    also: tuple[str, ...] = ()


def idle_terms(config: Config) -> Iterator[Contradiction]:
    """Finds the terms that cannot act.

    Args:
        config: A config whose keys are valid one by one.
    """
    yield from _idle_functions(config)
    yield from _identical_completions(config)


def _idle_functions(config: Config) -> Iterator[Contradiction]:
    functions, weights = config.rewards.functions, config.rewards.weights or []
    for index, (name, weight) in enumerate(zip(functions, weights, strict=False)):
        if weight == 0:
            yield Contradiction(
                f"rewards.weights[{index}]",
                weight,
                f"{name} would turn no advantage",
                "set another weight, or take it out of rewards.functions, instead",
                ("rewards.functions",),
            )
    for name, count in Counter(functions).items():
        if count > 1:
            yield Contradiction(
                "rewards.functions",
                functions,
                f"{name} stands there {count} times, and the second is a multiple of the first",
                "name it once, with the sum of the weights, instead",
            )
    pattern = config.rewards.format_pattern
    if pattern is not None and "format" in functions and matches_everything(pattern):
        yield Contradiction(
            "rewards.format_pattern",
            pattern,
            "matches every completion, so format is the same for all of a prompt",
            r"set one that some do not match, for example \A[0-9]+\Z, instead",
            ("rewards.functions",),
        )


def matches_everything(pattern: str) -> bool:
    """Whether it is certain that `re.search` finds a regular expression in every text."""
    try:
        return re.search(pattern, "") is not None and LOOKS_AROUND.search(pattern) is None
    except re.error:
        return False


def _identical_completions(config: Config) -> Iterator[Contradiction]:
    values = config.grpo.trl_values
    more = values.get("generation_kwargs")
    for prefix, given in (("grpo", values), ("grpo.generation_kwargs", more)):
        for name, is_greedy in GREEDY.items():
            value = (given or {}).get(name)
            if isinstance(value, int | float) and is_greedy(value):
                yield Contradiction(
                    f"{prefix}.{name}",
                    value,
                    "all completions of a prompt would be the same, and every reward with them",
                    "set true instead" if name == "do_sample" else "leave it out instead",
                )
