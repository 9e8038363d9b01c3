"""Stage 5: measures every model of the run on the same held-out prompts and writes the report.

Zeros are counted in the saved model itself; a mask file is never trusted.
"""

import json
import logging
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder, write_json
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluation.accuracy import AccuracyResult
from pipeline.evaluation.completions import TokenPair
from pipeline.evaluation.report import Measurements, Report, build_report, write_report
from pipeline.evaluation.summary import RunDescription, Sample, terminal_summary
from pipeline.models.loading import load_model
from pipeline.models.paths import resolve_model
from pipeline.models.prunable import measured_sparsity
from pipeline.stages.drawing import draw
from pipeline.stages.inputs import (
    TaskInputs,
    check_teacher,
    device,
    open_dense_student,
    open_teacher,
    stage_before,
)
from pipeline.stages.measure import (
    COMPLETIONS,
    comparable,
    from_json,
    measure,
    reference_completions,
    text_in_words,
    to_json,
)
from pipeline.stages.run_facts import asked, command, facts, settings

BETWEEN = {"distill": "distilled", "on_policy": "on_policy"}
"""Stages whose student is no more the final one when another has trained it, and its name then."""

logger = logging.getLogger(__name__)


def run(config: Config, folder: RunFolder, inputs: TaskInputs, out: Path) -> None:
    """Measures, draws and reports."""
    teacher, pairs = _teacher(config, folder, inputs)
    measured, student = _measure_all(config, folder, inputs, teacher, pairs)
    write_json(out / "metrics.json", {name: to_json(value) for name, value in measured.items()})
    report = _report(config, folder, measured, student)
    description = RunDescription(
        name=folder.root.resolve().name,
        asked=asked(config, folder, inputs),
        settings=settings(config),
        command=command(config, folder),
        student_path=str(_student_path(config, folder)),
        example_prompt=inputs.format(inputs.task.test[0].prompt),
        max_new_tokens=config.evaluate.max_new_tokens,
        pictures=draw(config, folder, report),
        samples=_samples(config, inputs, {n: m.accuracy for n, m in measured.items()}),
    )
    write_report(folder.root, report, description)
    print(terminal_summary(report, description), flush=True)


def _teacher(
    config: Config, folder: RunFolder, inputs: TaskInputs
) -> tuple[PreTrainedModel | None, list[TokenPair] | None]:
    """The teacher, and the completions that all models are scored on.

    Without a trained student a teacher of another family is left out with a word, so that any
    model can be measured.
    """
    try:
        check_teacher(config, inputs.tokenizer)
    except UserError as error:
        if stage_before(folder, "evaluate"):
            raise
        logger.warning("no comparison with the teacher: %s", error)
        return None, None
    teacher = open_teacher(config)
    return teacher, reference_completions(folder, config, teacher, inputs)


def _measure_all(
    config: Config,
    folder: RunFolder,
    inputs: TaskInputs,
    teacher: PreTrainedModel | None,
    pairs: list[TokenPair] | None,
) -> tuple[dict[str, Measurements], PreTrainedModel]:
    """Every model the run has, and the final student."""
    measured: dict[str, Measurements] = {}

    def add(name: str, model: PreTrainedModel, against: PreTrainedModel | None) -> None:
        measured[name] = measure(name, model, config, inputs, against, pairs)

    if teacher is not None:
        add("teacher", teacher, None)
    last = stage_before(folder, "evaluate")
    if last is None:
        student = open_dense_student(config)
        add("student", student, teacher)
        return measured, student
    add("dense", open_dense_student(config), teacher)
    one_shot = folder.stage("prune") / "one_shot" / "metrics.json"
    if one_shot.exists():
        pruned = from_json(json.loads(one_shot.read_text()))
        measured["pruned"] = comparable(pruned, measured["dense"])
    for stage, name in BETWEEN.items():
        if stage != last and folder.is_done(stage):
            add(name, load_model(str(folder.stage(stage) / "model")).to(device()), teacher)
    student = load_model(str(folder.stage(last) / "model")).to(device())
    add("student", student, teacher)
    return measured, student


def _student_path(config: Config, folder: RunFolder) -> str | Path:
    """What transformers can load; `bundled` is a word of ours alone."""
    last = stage_before(folder, "evaluate")
    if last is None:
        return resolve_model(config.student.path, "student.path")
    return folder.stage(last) / "model"


def _report(
    config: Config,
    folder: RunFolder,
    measured: dict[str, Measurements],
    student: PreTrainedModel,
) -> Report:
    last = stage_before(folder, "evaluate")
    sparsity, per_layer = measured_sparsity(student)
    return build_report(
        models=measured,
        measured_sparsity=sparsity,
        per_layer_sparsity=per_layer,
        target_sparsity=None if last is None else config.prune.sparsity,
        perplexity_on=COMPLETIONS[config.evaluate.completions],
        text_path=text_in_words(config),
        pass_at_k=config.evaluate.pass_at_k,
        **facts(config, folder),
    )


def _samples(
    config: Config, inputs: TaskInputs, results: dict[str, AccuracyResult]
) -> list[Sample]:
    return [
        Sample(
            prompt=row.prompt,
            answer=row.answer,
            completions={name: result.completions[index] for name, result in results.items()},
            correct={name: result.correct[index] for name, result in results.items()},
        )
        for index, row in enumerate(inputs.task.test[: config.evaluate.num_samples])
    ]
