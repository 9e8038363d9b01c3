"""The rules that tie two or more configuration keys together.

Each rule yields a `Fault` that says which keys it read, so that the caller can drop it when one of
those keys is faulty by itself.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config import TRAINING_STAGES, Config, PruneConfig, sweep_levels, sweep_row
from pipeline.prune_rules import STRUCTURED, contradictions
from pipeline.reward_rules import idle_terms


@dataclass(frozen=True)
class Fault:
    """One thing to mend."""

    key: str
    """Dotted key, for example `prune.sparsity`."""
    value: Any
    """What was given."""
    why: str
    """What is wrong with it."""
    remedy: str
    """What to do, as a phrase: `set run.seed instead`."""
    also: tuple[str, ...] = ()
    """Other dotted keys that the rule reads, or that an unknown key may have meant."""


def cross_faults(config: Config) -> list[Fault]:
    """Finds what no single key shows.

    Args:
        config: A config whose keys are valid one by one.

    Returns:
        The broken rules; empty when all hold.
    """
    rules = (
        _training_faults,
        _idle_term_faults,
        _teacher_term_faults,
        _sparsity_faults,
        _pattern_faults,
        _method_faults,
        _text_faults,
        _heldout_faults,
        _sweep_faults,
        _engine_faults,
        _lora_faults,
    )
    return [fault for rule in rules for fault in rule(config)]


def _training_faults(config: Config) -> Iterator[Fault]:
    """Master weights, number of steps, number of rewards, a loss that is not 0."""
    trained = [stage for stage in config.run.stages if stage in TRAINING_STAGES]
    for stage in trained:
        steps = getattr(config, stage).trl_values.get("max_steps")
        if stage in config.refine.stages and (steps is None or steps < 1):
            yield Fault(
                f"{stage}.max_steps",
                steps,
                f"refinement counts the optimizer steps of {stage} beforehand",
                "set 1 or more instead",
                ("run.stages", "refine.stages"),
            )
    if config.student.dtype == "bfloat16" and trained:
        yield Fault(
            "student.dtype",
            "bfloat16",
            f"{trained[0]} would train without fp32 master weights, and bfloat16 rounds the small "
            "updates of RL away",
            "set float32, and grpo.bf16: true for bfloat16 autocast, instead",
            ("run.stages",),
        )
    weights, functions = config.rewards.weights, config.rewards.functions
    if weights is not None and len(weights) != len(functions):
        yield Fault(
            "rewards.weights",
            weights,
            f"{len(weights)} numbers for {len(functions)} rewards.functions",
            f"set {len(functions)} of them, or null, instead",
            ("rewards.functions",),
        )
    yield from _format_faults(config)
    if config.distill.kl_weight == config.distill.ce_weight == 0:
        yield Fault(
            "distill.kl_weight",
            0,
            "with distill.ce_weight 0 too the loss is always 0",
            "set one of the two above 0 instead",
            ("distill.ce_weight",),
        )


def _format_faults(config: Config) -> Iterator[Fault]:
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
    except re.error as error:
        yield Fault(
            "rewards.format_pattern",
            pattern,
            f"no regular expression ({error})",
            "mend it; https://docs.python.org/3/library/re.html says what it may hold",
        )


def _idle_term_faults(config: Config) -> Iterator[Fault]:
    """No term of the reward mix is there for nothing."""
    return (Fault(*parts) for parts in idle_terms(config))


def _teacher_term_faults(config: Config) -> Iterator[Fault]:
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


def _sparsity_faults(config: Config) -> Iterator[Fault]:
    """The way from the first mask to the last one."""
    refine, target = config.refine, config.prune.sparsity
    start = target if refine.start_sparsity is None else refine.start_sparsity
    if start > target:
        yield Fault(
            "refine.start_sparsity",
            start,
            f"above the final prune.sparsity, {target}",
            f"set {target} or less, or null, instead",
            ("prune.sparsity",),
        )
    if start < target and not refine.stages:
        yield Fault(
            "refine.stages",
            [],
            f"no stage leads from refine.start_sparsity, {start}, to prune.sparsity, {target}",
            "set [distill, grpo], or refine.start_sparsity: null, instead",
            ("refine.start_sparsity", "prune.sparsity"),
        )
    if refine.verify and not config.moves_mask:
        yield Fault(
            "refine.verify",
            True,
            "there is no other mask to judge: sparsity, regrowth and score leave the first one",
            "set false, or refine.start_sparsity or refine.regrow_fraction, instead",
            ("refine.start_sparsity", "refine.regrow_fraction", "refine.score", "prune.sparsity"),
        )
    if refine.end_step is not None and refine.end_step <= refine.begin_step:
        yield Fault(
            "refine.end_step",
            refine.end_step,
            f"not after refine.begin_step, {refine.begin_step}",
            f"set {refine.begin_step + 1} or more, or null, instead",
            ("refine.begin_step",),
        )
    if refine.scope == "model" and refine.min_density > 1 - target:
        yield Fault(
            "refine.min_density",
            refine.min_density,
            f"more than prune.sparsity, {target}, leaves",
            f"set {1 - target:.6g} or less instead",
            ("prune.sparsity", "refine.scope"),
        )


def _pattern_faults(config: Config) -> Iterator[Fault]:
    """N:M has one sparsity, and no refinement keeps its pattern."""
    scope = config.prune.scope
    if scope is None or ":" not in scope:
        return
    kept, length = map(int, scope.split(":"))
    fixed = 1 - kept / length
    if abs(config.prune.sparsity - fixed) > 1e-6:
        yield Fault(
            "prune.sparsity",
            config.prune.sparsity,
            f"prune.scope {scope} keeps {kept} of every {length} weights",
            f"set {fixed:.6g} instead",
            ("prune.scope",),
        )
    yield from _fixed_mask_faults(config, f"prune.scope, {scope}", "prune.scope")


def _fixed_mask_faults(config: Config, pattern: str, key: str) -> Iterator[Fault]:
    """No schedule and no refinement keeps a pattern of more than single weights."""
    refine = config.refine
    if refine.start_sparsity not in (None, config.prune.sparsity):
        yield Fault(
            "refine.start_sparsity",
            refine.start_sparsity,
            f"the way to prune.sparsity would not keep the pattern of {pattern}",
            "set null instead",
            (key, "prune.sparsity"),
        )
    refined = [stage for stage in config.run.stages if stage in refine.stages]
    for name, fixed in (("regrow_fraction", 0.0), ("score", "magnitude")):
        value = getattr(refine, name)
        if value != fixed and refined:
            yield Fault(
                f"refine.{name}",
                value,
                f"refinement in {refined[0]} would not keep the pattern of {pattern}",
                f"set {fixed or 0} instead",
                (key, "run.stages", "refine.stages"),
            )


def _method_faults(config: Config) -> Iterator[Fault]:
    """What the one-shot method does not go with."""
    prune = config.prune
    yield from _method_contradictions(prune, "prune")
    if prune.method in STRUCTURED:
        yield from _fixed_mask_faults(config, f"prune.method, {prune.method}", "prune.method")
    refined = config.moves_mask and set(config.run.stages) & set(config.refine.stages)
    if prune.allocation != "uniform" and refined and config.refine.scope != "model":
        yield Fault(
            "refine.scope",
            config.refine.scope,
            f"would level the rates that prune.allocation, {prune.allocation}, chose",
            "set model, or refine.stages: [], instead",
            ("prune.allocation", "refine.stages"),
        )


def _method_contradictions(prune: PruneConfig, key: str) -> Iterator[Fault]:
    """What contradicts itself in a section `prune`, or in a row of a sweep; `key` is its own."""
    for name, value, why, remedy in contradictions(
        prune.method, prune.scope, prune.redistribution, prune.allocation
    ):
        yield Fault(f"{key}.{name}", value, why, remedy, ("prune.method", "prune.scope"))
    if not any(prune.score_parts.model_dump().values()):
        yield Fault(
            f"{key}.score_parts",
            prune.score_parts.model_dump(),
            "nothing is left to score by",
            "set one of magnitude, activation and movement to true instead",
        )
    if prune.redistribution == "admm" and not prune.score_parts.magnitude:
        yield Fault(
            f"{key}.score_parts.magnitude",
            False,
            "prune.redistribution admm compares by magnitude",
            "set true, or another prune.redistribution, instead",
            ("prune.redistribution",),
        )


def _text_faults(config: Config) -> Iterator[Fault]:
    """What reading plain text needs."""
    if config.calibration.source == "text" and config.calibration.text_path is None:
        yield Fault(
            "calibration.text_path",
            None,
            "calibration.source is text",
            "set a text file, or another calibration.source, instead",
            ("calibration.source",),
        )
    if config.evaluate.text_stride >= config.evaluate.text_seq_len:
        yield Fault(
            "evaluate.text_stride",
            config.evaluate.text_stride,
            "leaves no context in windows of evaluate.text_seq_len, "
            f"{config.evaluate.text_seq_len}",
            f"set {config.evaluate.text_seq_len - 1} or less instead",
            ("evaluate.text_seq_len",),
        )


def _heldout_faults(config: Config) -> Iterator[Fault]:
    """Patience counts measurements."""
    values = config.evaluate
    if values.patience is not None and values.every_steps is None:
        yield Fault(
            "evaluate.patience",
            values.patience,
            "counts measurements, and evaluate.every_steps is null",
            "set evaluate.every_steps to a number of steps such as 50, or this to null",
            ("evaluate.every_steps",),
        )


def _sweep_faults(config: Config) -> Iterator[Fault]:
    """A sweep has rows that `prune` accepts, and runs alone."""
    sweep, stages = config.sweep, config.run.stages
    if "sweep" not in stages:
        return
    if len(stages) > 1:
        yield Fault("run.stages", stages, "sweep runs alone", "set [sweep] instead")
    if not sweep.rows:
        yield Fault(
            "sweep.rows",
            {},
            "there is nothing to compare",
            "set rows such as in configs/sweep.yaml",
        )
    faults = [fault for label in sweep.rows for fault in _row_faults(config, label)]
    yield from faults
    if sweep.rows and not faults and not any(sweep_levels(config, row) for row in sweep.rows):
        yield Fault(
            "sweep.levels",
            sweep.levels,
            "no row of sweep.rows can have one of them",
            "add the level of its prune.scope, such as 0.5 for 2:4",
            ("sweep.rows",),
        )
    for name in ("levels", "seeds"):
        values = getattr(sweep, name)
        if len(set(values)) < len(values):
            yield Fault(f"sweep.{name}", values, "a value stands twice", "set each once instead")
    if sweep.headline is not None and sweep.headline not in sweep.rows:
        yield Fault(
            "sweep.headline",
            sweep.headline,
            "is no row",
            f"set one of {', '.join(sweep.rows)} instead",
            ("sweep.rows",),
        )
    missing = [level for level in sweep.recover_levels if level not in sweep.levels]
    if missing:
        yield Fault(
            "sweep.recover_levels",
            missing,
            "not among sweep.levels",
            "add them there",
            ("sweep.levels",),
        )
    if sweep.recover_levels and config.distill.trl_values.get("max_steps", 0) < 1:
        yield Fault(
            "distill.max_steps",
            config.distill.trl_values.get("max_steps"),
            "sweep.recover_levels trains every student for the same number of steps",
            "set 1 or more instead",
            ("sweep.recover_levels",),
        )


def _row_faults(config: Config, label: str) -> Iterator[Fault]:
    """What is wrong with one row of a sweep."""
    key = f"sweep.rows.{label}"
    try:
        prune = sweep_row(config, label)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = ".".join(map(str, detail["loc"]))
            yield Fault(f"{key}.{name}", detail["input"], detail["msg"], "see --help for prune")
        return
    if "sparsity" in config.sweep.rows[label]:
        yield Fault(
            f"{key}.sparsity",
            prune.sparsity,
            "a row is pruned at every value of sweep.levels",
            "set sweep.levels instead",
        )
    yield from _method_contradictions(prune, key)


def _engine_faults(config: Config) -> Iterator[Fault]:
    """What movement and scores need from each other and from the optimizer."""
    if config.movement.kept == "displacement" and config.movement.dtype == "bfloat16":
        yield Fault(
            "movement.dtype",
            "bfloat16",
            "movement.kept displacement is a difference of two magnitudes, of which bfloat16 keeps "
            "nothing",
            "set float32, or movement.kept: gradient, instead",
            ("movement.kept",),
        )
    if config.refine.score == "fisher" and config.distill.muon_learning_rate is not None:
        yield Fault(
            "refine.score",
            "fisher",
            "needs Adam's second moment, which distill.muon_learning_rate leaves out",
            "set magnitude, or distill.muon_learning_rate: null, instead",
            ("distill.muon_learning_rate",),
        )


def _lora_faults(config: Config) -> Iterator[Fault]:
    """An adapter has no gradient and no moments for each weight, and no whole matrix to step."""
    if config.lora.r is None:
        return
    levels = config.sweep.recover_levels if "sweep" in config.run.stages else []
    for key, value, accepted, why, remedy in (
        (
            "movement.kept",
            config.movement.kept,
            ("displacement",),
            "no weight of an adapter's product has a gradient of its own",
            "set displacement",
        ),
        (
            "movement.pruned",
            config.movement.pruned,
            ("proposed",),
            "no weight of an adapter's product has a gradient of its own",
            "set proposed",
        ),
        (
            "refine.score",
            config.refine.score,
            ("magnitude", "movement", "mix"),
            "no weight of an adapter's product has a second moment of its own",
            "set magnitude",
        ),
        (
            "distill.muon_learning_rate",
            config.distill.muon_learning_rate,
            (None,),
            "with adapters no whole matrix is trained, which it could orthogonalise",
            "set null",
        ),
        (
            "grpo.use_vllm",
            config.grpo.trl_values.get("use_vllm", False),
            (False,),
            "TRL merges adapters for vLLM without their mask",
            "set false",
        ),
        (
            "grpo.num_masks",
            config.grpo.num_masks,
            (1,),
            "the next mask is tried on the optimizer's weights, where no adapter's product is",
            "set 1",
        ),
        (
            "refine.verify",
            config.refine.verify,
            (False,),
            "candidate masks are tried on the optimizer's weights, where no adapter's product is",
            "set false",
        ),
        (
            "run.stages",
            [stage for stage in config.run.stages if stage == "on_policy"],
            ([],),
            "on_policy trains its student whole",
            "leave on_policy out",
        ),
        (
            "sweep.recover_levels",
            levels,
            ([],),
            "a sweep trains its students whole",
            "set []",
        ),
    ):
        if value not in accepted:
            yield Fault(key, value, why, f"{remedy}, or lora.r: null, instead", ("lora.r",))
