r"""Which terms of a reward mix cannot act, as far as the config alone shows it.

GRPO subtracts the mean of a group. So a term does nothing that has weight 0, that is another term
again (then it only changes that one's weight), or that has one value for all completions of a
prompt: a pattern that matches every text, completions that are all the same text, a bonus for the
sparsity of the one mask that they come from. What only a batch shows,
`pipeline/training/acting_terms.py` measures.

A pattern matches every text if it matches the empty one and has nothing that looks around itself
(`^ $ \A \Z \b \B`, look-ahead, look-behind): then the empty match at the beginning is always there.
"""

import re
from collections import Counter
from collections.abc import Iterator

from pipeline.config import END_FRACTION, TRAINING_STAGES, Config
from pipeline.rules.fault import Fault
from pipeline.rules.rewards import NO_PATTERN

MIN_DIFFERENCE = 0.01
"""Sparsity by which the second of two masks is sparser at least."""

LOOKS_AROUND = re.compile(r"[\^$]|\\[AZbB]|\(\?<?[=!]")

GREEDY = {
    "top_k": lambda value: value == 1,
    "top_p": lambda value: value == 0,
    "min_p": lambda value: value >= 1,
    "do_sample": lambda value: value is False,
}
"""Keys of sampling to values that leave one possible next token."""


def idle_terms(config: Config) -> Iterator[Fault]:
    """Finds the terms that cannot act.

    Args:
        config: A config whose keys are valid one by one.
    """
    yield from _idle_functions(config)
    yield from _identical_completions(config)
    yield from _idle_bonus(config)
    yield from _idle_masks(config)


def _idle_functions(config: Config) -> Iterator[Fault]:
    functions, weights = config.rewards.functions, config.rewards.weights or []
    for index, (name, weight) in enumerate(zip(functions, weights, strict=False)):
        if weight == 0:
            yield Fault(
                f"rewards.weights[{index}]",
                weight,
                f"{name} would turn no advantage",
                "set another weight, or take it out of rewards.functions, instead",
                ("rewards.functions",),
            )
    for name, count in Counter(functions).items():
        if count > 1:
            yield Fault(
                "rewards.functions",
                functions,
                f"{name} stands there {count} times, and the second is a multiple of the first",
                "name it once, with the sum of the weights, instead",
            )
    pattern = config.rewards.format_pattern
    if pattern is not None and "format" in functions and matches_everything(pattern):
        yield Fault(
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
    except NO_PATTERN:
        return False


def _identical_completions(config: Config) -> Iterator[Fault]:
    values = config.grpo.trl_values
    more = values.get("generation_kwargs")
    for prefix, given in (("grpo", values), ("grpo.generation_kwargs", more)):
        for name, is_greedy in GREEDY.items():
            value = (given or {}).get(name)
            if isinstance(value, int | float) and is_greedy(value):
                yield Fault(
                    f"{prefix}.{name}",
                    value,
                    "all completions of a prompt would be the same, and every reward with them",
                    "set true instead" if name == "do_sample" else "leave it out instead",
                )


def _idle_bonus(config: Config) -> Iterator[Fault]:
    """The sparsity bonus acts where masks are compared."""
    weight, stages = config.rewards.sparsity_weight, config.run.stages
    if weight == 0 or not set(TRAINING_STAGES) & set(stages):
        return
    verifies = config.refine.verify and set(config.refine.stages) & set(stages)
    two_masks = config.grpo.num_masks == 2 and "grpo" in stages
    if not verifies and not two_masks:
        yield Fault(
            "rewards.sparsity_weight",
            weight,
            "all completions of a prompt come from one mask, so it is correctness times a constant",
            "set grpo.num_masks: 2, refine.verify: true, or 0, instead",
            ("grpo.num_masks", "refine.verify", "refine.stages", "run.stages"),
        )
    elif two_masks and "correctness" not in config.rewards.functions:
        yield Fault(
            "rewards.sparsity_weight",
            weight,
            "right completions earn it, and rewards.functions does not ask which are right",
            "add correctness there, or set 0, instead",
            ("rewards.functions", "grpo.num_masks"),
        )


def _idle_masks(config: Config) -> Iterator[Fault]:
    """Groups under two masks need a second mask, and halves."""
    values = config.grpo.trl_values
    if config.grpo.num_masks == 1 or "grpo" not in config.run.stages:
        return
    if values.get("use_vllm"):
        yield _one_mask("vLLM would sample both halves with the weights of one mask", "use_vllm")
    num_generations = values.get("num_generations")
    if isinstance(num_generations, int) and num_generations % 2:
        yield Fault(
            "grpo.num_generations",
            num_generations,
            "grpo.num_masks 2 samples one half of a group under either mask",
            f"set {num_generations + 1}, or grpo.num_masks: 1, instead",
            ("grpo.num_masks",),
        )
    refine, target = config.refine, config.prune.sparsity
    if "grpo" not in refine.stages:
        yield _one_mask("refine.stages does not name grpo, whose mask stays", "refine.stages")
    elif refine.start_sparsity in (None, target):
        yield _one_mask(
            f"training starts at prune.sparsity, {target}, and no mask is sparser",
            "refine.start_sparsity",
            "prune.sparsity",
        )
    else:
        yield from _idle_end(config)


def _idle_end(config: Config) -> Iterator[Fault]:
    """The cubic schedule (`sparsity/schedule.py`) still has some way to go when grpo begins."""
    refine, stages = config.refine, config.run.stages
    refining = [stage for stage in refine.stages if stage in stages]
    steps = {name: getattr(config, name).trl_values.get("max_steps") or 0 for name in refining}
    if refine.verify or refining != refine.stages:
        return  # it may wait, or has begun before, and its record says when
    end = refine.end_step or round(END_FRACTION * sum(steps.values()))
    before = sum(steps.values()) - steps["grpo"]
    begin = refine.begin_step
    last = before - (before - begin) % refine.every_steps  # refinement before grpo
    to_go = 1.0 if last < begin else max(0.0, (end - last) / max(1, end - begin))
    left = (config.prune.sparsity - refine.start_sparsity) * to_go**3
    if before >= end or left < MIN_DIFFERENCE:
        yield _one_mask(
            f"grpo begins after step {before}, and there the schedule, which ends at step {end}, "
            f"has less than {MIN_DIFFERENCE} of sparsity to go",
            "refine.begin_step",
            "refine.end_step",
            "refine.every_steps",
            "refine.start_sparsity",
            "refine.stages",
            "prune.sparsity",
            "distill.max_steps",
            "on_policy.max_steps",
            "grpo.max_steps",
            remedy="set a later refine.end_step, refine.stages: [grpo], or num_masks 1,",
        )


def _one_mask(why: str, *also: str, remedy: str = "set 1") -> Fault:
    keys = tuple(key if "." in key else f"grpo.{key}" for key in also)
    return Fault("grpo.num_masks", 2, why, f"{remedy} instead", keys)
