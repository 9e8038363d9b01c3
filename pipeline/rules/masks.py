"""Rules on masks: the way from the first to the last one, and what keeps a pattern."""

from collections.abc import Iterator

from pipeline.config import Config, PruneConfig
from pipeline.rules.fault import Fault
from pipeline.rules.prune import STRUCTURED, contradictions


def sparsity_faults(config: Config) -> Iterator[Fault]:
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


def pattern_faults(config: Config) -> Iterator[Fault]:
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


def method_faults(config: Config) -> Iterator[Fault]:
    """What the one-shot method does not go with."""
    prune = config.prune
    yield from method_contradictions(prune, "prune")
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


def method_contradictions(prune: PruneConfig, key: str) -> Iterator[Fault]:
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
