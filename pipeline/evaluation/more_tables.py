"""Tables of what only some runs measure, as rows of text for any page: pass@k and zero-shot tasks.

Both read `report.json` alone. One row for each k or task, one column for each model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.formats import number, percent_within
from pipeline.evaluation.harness import METRICS
from pipeline.evaluation.summary import MODELS, NOT_MEASURED, Report


@dataclass(frozen=True)
class Table:
    """A table with its heading and the sentence that explains it."""

    title: str
    note: str
    rows: list[list[str]]
    """The first is the header; plain text, nothing escaped."""


def more_tables(report: Report) -> list[Table]:
    """The tables that this report has figures for."""
    tables = []
    if "pass_at_k" in report:
        tables.append(_pass_at_k(report["pass_at_k"]))
    if "zero_shot" in report:
        tables.append(_zero_shot(report["zero_shot"]))
    return tables


def _pass_at_k(found: Mapping[str, Any]) -> Table:
    names = [name for name in MODELS if name in found]
    rows = [["answers", *names]]
    for k in found[names[0]]:
        cells = [percent_within(found[name][k], found["ci95"][name][k]) for name in names]
        rows.append([f"pass@{k}", *cells])
    return Table(
        "Sampled accuracy",
        f"Chance that one of k sampled answers is right, unbiased, with its 95 % interval over "
        f"{found['num_prompts']:,} prompts; {found['num_samples']} answers each at temperature "
        f"{found['temperature']:g}.",
        rows,
    )


def _zero_shot(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    names = [name for name in MODELS if name in found]
    tasks = list(dict.fromkeys(task for name in names for task in found[name]))
    rows = [["task", "examples", "metric", *names]]
    for task in tasks:
        scores = [found[name].get(task) for name in names]
        known = next(score for score in scores if score is not None)
        rows.append([task, _shots(known), known["metric"], *map(score_text, scores)])
    shared = [task for task in tasks if all(task in found[name] for name in names)]
    note = (
        "lm-evaluation-harness; how many solved examples the prompt has; value and standard error."
    )
    if len(shared) > 1 and all(found[names[0]][task]["metric"] in METRICS for task in shared):
        means = [sum(found[name][task]["value"] for task in shared) / len(shared) for name in names]
        rows.append(["average", "", "", *(f"{100 * mean:.2f} %" for mean in means)])
        note += " The average is plain, over the tasks that all models have."
    is_zero_shot = all(row[1] in ("0", "") for row in rows[1:])
    return Table("Zero-shot tasks" if is_zero_shot else "Few-shot tasks", note, rows)


def _shots(score: Mapping[str, Any]) -> str:
    """Of a report from before there was a choice, 0."""
    shots = score.get("num_fewshot", 0)
    return "mixed" if shots is None else str(shots)


def score_text(score: Mapping[str, Any] | None) -> str:
    """Value and standard error of one model on one task, as `TaskScore` in report.json."""
    if score is None:
        return NOT_MEASURED
    if score["metric"] not in METRICS:
        return number(score["value"])
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.2f}"
    return f"{100 * score['value']:.2f}{error} %"
