"""What a run asked for and what came out, as `report.json`, `report.md` and `report.html`.

`report.json` (schema 1) holds the numbers. Keys may be added, never renamed. A key that is absent
was not measured; a perplexity or KL of null was measured and is not finite. `report.md` shows the
same numbers beside the question, the pictures and sample answers (`markdown.py`), and
`report.html` is the same page in one file (`page.py`).

Everything comes in as plain data; nothing is read from a run folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.evaluation.accuracy import AccuracyResult
from pipeline.evaluation.agreement import Agreement
from pipeline.evaluation.harness import TaskScore
from pipeline.evaluation.intervals import (
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
    wilson_interval,
)
from pipeline.evaluation.markdown import render_markdown
from pipeline.evaluation.page import write_page
from pipeline.evaluation.perplexity import Perplexity
from pipeline.evaluation.sampled_accuracy import SampledAccuracy
from pipeline.evaluation.summary import MODELS, Report, RunDescription

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured of one model; None where it was not."""

    accuracy: AccuracyResult | None = None
    perplexity: Perplexity | None = None
    agreement: Agreement | None = None
    """With the teacher, which has none with itself."""
    text_perplexity: Perplexity | None = None
    """On a text out of the task's domain."""
    sampled: SampledAccuracy | None = None
    zero_shot: Mapping[str, TaskScore] | None = None
    """Task of lm-evaluation-harness to its score."""


def build_report(
    *,
    models: Mapping[str, Measurements],
    measured_sparsity: float | None,
    per_layer_sparsity: Mapping[str, float],
    target_sparsity: float | None = None,
    perplexity_on: str | None = None,
    text_path: str | None = None,
    pass_at_k: Sequence[int] = (1,),
    refinement: Sequence[Mapping[str, Any]] | None = None,
    heldout: Mapping[str, Mapping[str, Any]] | None = None,
    topology_changes: Sequence[Mapping[str, Any]] = (),
    timing: Mapping[str, float] | None = None,
    cost: Mapping[str, Mapping[str, Any]] | None = None,
    peak_memory_bytes: int | None = None,
    versions: Mapping[str, str] | None = None,
    seed: int | None = None,
    git_commit: str | None = None,
    config_hash: str | None = None,
) -> Report:
    """Puts a run's numbers into schema 1.

    Args:
        models: Any of `teacher`, `dense` (the student before pruning), `pruned` (the one-shot
            student at the final target), `distilled`, `on_policy`, `student`; all on the same
            prompts.
        measured_sparsity: Fraction of zeros among the final model's prunable weights, counted;
            None where there is none yet.
        per_layer_sparsity: The same for each weight by name.
        target_sparsity: What was asked for.
        perplexity_on: The text behind the perplexities, in words.
        text_path: The text behind the text perplexities.
        pass_at_k: Values of k to show of sampled answers.
        refinement: One entry for each refinement step: stage, step, target, pruned, regrown,
            survived (of all that ever regrew), accepted; under refine.verify also reward_before,
            reward_after (of the mask bound, or of the best one refused), score, and waited.
        heldout: Training stage to its optimizer `steps`, and to `step` and `accuracy`, on prompts
            set aside, of the student it left.
        topology_changes: One entry for each time a stage went on under another layout of ranks:
            stage, step, and `before` and `after`, each with `engine` and `world_size`.
        timing: Stage to seconds.
        cost: Stage to `device`, `processes`, `device_hours`, and of a training stage `tokens`.
        peak_memory_bytes: Largest of the run's processes.
        versions: Package to version.
        seed: Of the run.
        git_commit: Of the code that ran.
        config_hash: Of the resolved config.

    Returns:
        JSON values; what is None or empty above is absent.
    """
    assert set(models) <= set(MODELS), f"unknown model among {list(models)}"
    measured = {name: models[name] for name in MODELS if name in models}
    report = {
        "schema": SCHEMA,
        "sparsity": _present(
            target=target_sparsity,
            measured=measured_sparsity,
            per_layer=dict(per_layer_sparsity) or None,
        ),
        "accuracy": _accuracy(_by_model(measured, "accuracy")),
        "perplexity": _perplexity(_by_model(measured, "perplexity"), perplexity_on),
        "text_perplexity": _perplexity(_by_model(measured, "text_perplexity"), text_path),
        "pass_at_k": _sampled(_by_model(measured, "sampled"), pass_at_k),
        "zero_shot": {
            name: {task: vars(score) for task, score in scores.items()}
            for name, scores in _by_model(measured, "zero_shot").items()
        },
        "kl_to_teacher": {
            name: agreement.kl for name, agreement in _by_model(measured, "agreement").items()
        },
        "top1_with_teacher": {
            name: agreement.top1 for name, agreement in _by_model(measured, "agreement").items()
        },
        "heldout": {stage: dict(found) for stage, found in (heldout or {}).items()},
        "timing": dict(timing or {}),
        "cost": {stage: dict(found) for stage, found in (cost or {}).items()},
        "versions": dict(versions or {}),
    }
    report = {key: value for key, value in report.items() if value != {}}
    return report | _present(
        refinement=None if refinement is None else [dict(entry) for entry in refinement],
        topology_changes=[dict(entry) for entry in topology_changes] or None,
        peak_memory_bytes=peak_memory_bytes,
        seed=seed,
        git_commit=git_commit,
        config_hash=config_hash,
    )


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _by_model(models: Mapping[str, Measurements], kind: str) -> dict[str, Any]:
    return _present(**{name: getattr(measured, kind) for name, measured in models.items()})


def _accuracy(results: Mapping[str, AccuracyResult]) -> dict[str, Any]:
    if not results:
        return {}
    (num_prompts,) = {result.num_prompts for result in results.values()}
    accuracy = {name: result.accuracy for name, result in results.items()}
    intervals = {
        name: list(wilson_interval(sum(result.correct), num_prompts))
        for name, result in results.items()
    }
    comparison = {}
    if "student" in results and "dense" in results:
        student, dense = results["student"], results["dense"]
        comparison["student_minus_dense"] = {
            "value": student.accuracy - dense.accuracy,
            "ci95": list(paired_difference_interval(student.correct, dense.correct)),
        }
        if dense.accuracy > 0:
            comparison["student_over_dense"] = {
                "value": student.accuracy / dense.accuracy,
                "ci95": list(paired_ratio_interval(student.correct, dense.correct)),
            }
    return {**accuracy, "num_prompts": num_prompts, "ci95": intervals, **comparison}


def _perplexity(results: Mapping[str, Perplexity], on: str | None) -> dict[str, Any]:
    if not results:
        return {}
    ((num_tokens, seq_len, stride),) = {
        (result.num_tokens, result.seq_len, result.stride) for result in results.values()
    }
    values = {name: result.value for name, result in results.items()}
    return {
        **values,
        "num_tokens": num_tokens,
        "seq_len": seq_len,
        **_present(stride=stride, on=on),
    }


def _sampled(results: Mapping[str, SampledAccuracy], ks: Sequence[int]) -> dict[str, Any]:
    if not results:
        return {}
    ((num_prompts, num_samples, temperature),) = {
        (len(result.num_correct), result.num_samples, result.temperature)
        for result in results.values()
    }
    values, intervals = {}, {}
    for name, result in results.items():
        by_k = {str(k): result.pass_at(k) for k in ks}
        values[name] = {k: sum(found) / num_prompts for k, found in by_k.items()}
        intervals[name] = {k: list(mean_interval(found)) for k, found in by_k.items()}
    return {
        **values,
        "ci95": intervals,
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "temperature": temperature,
    }


def write_report(folder: Path, report: Report, description: RunDescription) -> None:
    """Writes `report.json`, `report.md` and `report.html`, each whole or not at all.

    Args:
        folder: The run folder; it exists.
        report: From `build_report`.
        description: What the pages say beside the numbers.
    """
    write_json(folder / "report.json", report)
    write_page(folder / "report.md", render_markdown(report, description), description.pictures)
