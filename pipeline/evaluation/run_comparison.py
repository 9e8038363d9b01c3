"""Runs beside each other: what came out, what it cost, and which config keys differ.

A difference between two students is paired where both answered the same prompts, which is so where
task and seed are the same. Everything comes in as plain data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.evaluation.figures import Picture
from pipeline.evaluation.formats import duration, number, percent, percent_within, perplexity_text
from pipeline.evaluation.intervals import paired_difference_interval
from pipeline.evaluation.markdown import escape, picture_link, table
from pipeline.evaluation.more_tables import score_text
from pipeline.evaluation.summary import MODELS, NOT_FINITE, NOT_MEASURED, Report, text_table
from pipeline.evaluation.training_curves import Log

Rows = list[list[str]]

UNSET = "not set"
NUMBERS = {
    "perplexity": ("perplexity", perplexity_text),
    "text perplexity": ("text_perplexity", perplexity_text),
    "KL to teacher": ("kl_to_teacher", number),
    "top-1 as teacher": ("top1_with_teacher", percent),
}
"""Name of a measure to its key in report.json and how it is written."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of one run."""

    name: str
    config: Mapping[str, Any]
    """Dotted key to value."""
    report: Report
    """Of an unfinished run, empty or in part."""
    stages: Mapping[str, bool]
    """Stage to whether it is done."""
    correct: Sequence[bool] | None
    """Which held-out prompts the student answered right."""
    logs: Mapping[str, Log]
    """Training stage to its log history, as far as it came."""


def result_rows(runs: Sequence[Run]) -> Rows:
    """Header and a row for each measure that any run has; runs across."""
    rows = [["run", *(run.name for run in runs)], _row("stages", runs, _stages)]
    rows.append(_row("sparsity", runs, lambda r: f"{r.report['sparsity']['measured']:.4f}"))
    for model in MODELS:
        rows.append(_row(f"accuracy, {model}", runs, partial(_accuracy, model=model)))
    rows.append(_row(f"student minus that of {runs[0].name}", runs[1:], _difference_to(runs[0])))
    rows[-1].insert(1, NOT_MEASURED)
    for measure, (key, show) in NUMBERS.items():
        for model in MODELS:
            name = f"{measure}, {model}"
            rows.append(_row(name, runs, partial(_number, key=key, model=model, show=show)))
    rows += _more_rows(runs)
    rows += [
        _row("time", runs, lambda r: duration(sum(r.report["timing"].values()))),
        _row("device hours", runs, lambda r: number(_total(r, "device_hours"))),
        _row("tokens trained on", runs, lambda r: f"{_total(r, 'tokens'):,}"),
        _row("peak memory, GiB", runs, lambda r: f"{r.report['peak_memory_bytes'] / 2**30:.2f}"),
        _row("seed", runs, lambda r: str(r.report["seed"])),
        _row("git commit", runs, lambda r: r.report["git_commit"][:12]),
        _row("config hash", runs, lambda r: r.report["config_hash"][:12]),
    ]
    return [row for row in rows if set(row[1:]) != {NOT_MEASURED}]


def _row(name: str, runs: Sequence[Run], cell: Callable[[Run], str]) -> list[str]:
    return [name, *(_cell(run, cell) for run in runs)]


def _cell(run: Run, cell: Callable[[Run], str]) -> str:
    """What was measured; a key that is absent was not."""
    try:
        return cell(run)
    except KeyError:
        return NOT_MEASURED


def _stages(run: Run) -> str:
    return ", ".join(f"{n}{'' if done else ' (not done)'}" for n, done in run.stages.items())


def _accuracy(run: Run, model: str) -> str:
    accuracy = run.report["accuracy"]
    return percent_within(accuracy[model], accuracy["ci95"][model])


def _more_rows(runs: Sequence[Run]) -> Rows:
    """What only some runs measure: sampled accuracy, and tasks of lm-evaluation-harness."""

    def pass_at(run: Run, model: str, name: str) -> str:
        found = run.report["pass_at_k"]
        return percent_within(found[model][name], found["ci95"][model][name])

    def score(run: Run, model: str, name: str) -> str:
        return score_text(run.report["zero_shot"][model][name])

    rows = []
    for key, prefix, cell in (("pass_at_k", "pass@", pass_at), ("zero_shot", "", score)):
        found = [run.report.get(key, {}).get(model, ()) for run in runs for model in MODELS]
        rows += [
            _row(f"{prefix}{name}, {model}", runs, partial(cell, model=model, name=name))
            for name in dict.fromkeys(name for names in found for name in names)
            for model in MODELS
        ]
    return rows


def _number(run: Run, *, key: str, model: str, show: Callable[[float], str]) -> str:
    value = run.report[key][model]
    return NOT_FINITE if value is None else show(value)


def _difference_to(first: Run) -> Callable[[Run], str]:
    def difference(run: Run) -> str:
        points = 100 * (run.report["accuracy"]["student"] - first.report["accuracy"]["student"])
        if not same_prompts(run, first):
            return f"{points:+.1f} points, other prompts"
        low, high = paired_difference_interval(run.correct, first.correct)
        return f"{points:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"

    return difference


def same_prompts(run: Run, other: Run) -> bool:
    """Whether both students answered the same held-out prompts."""
    if run.correct is None or other.correct is None or len(run.correct) != len(other.correct):
        return False
    different = differing_keys([run, other])
    return not any(key.startswith("task.") for key in different)


def _total(run: Run, key: str) -> float:
    found = [spent[key] for spent in run.report["cost"].values() if key in spent]
    if not found:
        raise KeyError(key)
    return sum(found)


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Config key to its values as text, run by run, for every key that is not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {key: [_value(run, key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _value(run: Run, key: str) -> str:
    return str(run.config[key]) if key in run.config else UNSET


def render_comparison(runs: Sequence[Run], pictures: Mapping[str, Picture]) -> str:
    """The page in Markdown.

    Args:
        runs: Two or more.
        pictures: Path to picture, from `run_curves.plot_runs`.
    """
    keys = [[f"`{key}`", *map(escape, values)] for key, values in differing_keys(runs).items()]
    header = ["key", *(escape(run.name) for run in runs)]
    return (
        "\n\n".join(
            [
                "# Runs side by side",
                f"{len(runs)} runs, {len(keys)} config keys that differ.",
                "## What came out",
                table([[escape(cell) for cell in row] for row in result_rows(runs)]),
                "Brackets: 95 % intervals; of a difference, paired over the prompts.",
                *_curves(pictures),
                "## Config keys that differ",
                table([header, *keys]) if keys else "None.",
            ]
        )
        + "\n"
    )


def _curves(pictures: Mapping[str, Picture]) -> list[str]:
    """The section of pictures, where training has logged anything."""
    if not pictures:
        return []
    return [
        "## Training",
        "Pale lines are what was logged, strong ones a running mean. The steps of each stage count "
        "from its beginning, and a stage is as wide as its longest run.",
        *(picture_link(path, picture) for path, picture in pictures.items()),
    ]


def text_comparison(runs: Sequence[Run]) -> str:
    """The same for a terminal."""
    keys = [[key, *values] for key, values in differing_keys(runs).items()]
    lines = [*text_table(result_rows(runs)), ""]
    if not keys:
        return "\n".join([*lines, "All config keys are the same."])
    return "\n".join([*lines, "Config keys that differ:", *text_table(keys)])
