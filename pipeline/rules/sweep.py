"""Rules on a sweep and its rows."""

from collections.abc import Iterator

from pydantic import ValidationError

from pipeline.config import Config, sweep_levels, sweep_row
from pipeline.rules.fault import Fault
from pipeline.rules.masks import method_contradictions


def sweep_faults(config: Config) -> Iterator[Fault]:
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
    for key, off in (("sampled_completions", None), ("zero_shot", [])):
        value = getattr(config.evaluate, key)
        if value != off:
            yield Fault(
                f"evaluate.{key}",
                value,
                "a sweep shows greedy accuracy, KL and perplexity only",
                f"set {'null' if off is None else '[]'} instead, and measure single students",
                ("run.stages",),
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
    yield from method_contradictions(prune, key)
