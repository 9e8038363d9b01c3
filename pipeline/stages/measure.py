"""The same measurement for every model of a run: accuracy, perplexity, agreement with the teacher.

Accuracy: greedy, on held-out prompts. Perplexity and KL: on the teacher's greedy completions of the
same prompts, because a task's reference answer need not be what a model should write.
"""

from dataclasses import asdict

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.evaluation.accuracy import AccuracyResult, greedy_accuracy
from pipeline.evaluation.agreement import Agreement, agreement_with_teacher
from pipeline.evaluation.perplexity import Perplexity, completion_perplexity
from pipeline.evaluation.report import Measurements
from pipeline.rollouts import Rollout
from pipeline.stages.inputs import TaskInputs, cached_rollouts

PERPLEXITY_ON = "the teacher's greedy completions of the held-out prompts"


def teacher_answers(
    folder: RunFolder, config: Config, teacher: PreTrainedModel, inputs: TaskInputs
) -> list[Rollout]:
    """The teacher's greedy completions of the held-out prompts, made once per run."""
    rows = inputs.task.test
    return cached_rollouts(
        folder,
        "test",
        config,
        teacher,
        inputs,
        rows,
        num_rollouts=len(rows),
        temperature=0.0,
        max_new_tokens=config.evaluate.max_new_tokens,
        progress="teacher answers",
    )


def measure(
    name: str,
    model: PreTrainedModel,
    config: Config,
    inputs: TaskInputs,
    teacher: PreTrainedModel | None,
    answers: list[Rollout] | None,
) -> Measurements:
    """Measures one model.

    Args:
        name: Shown on the progress bars.
        model: In evaluation mode.
        config: Batch size and lengths.
        inputs: The task.
        teacher: To compare with; None leaves that out.
        answers: The teacher's greedy completions of the same rows; None leaves out what needs them.
    """
    accuracy = greedy_accuracy(
        model,
        inputs.tokenizer,
        inputs.task.test,
        inputs.encode,
        inputs.verifier,
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=config.evaluate.batch_size,
        progress=f"{name}: accuracy",
    )
    if answers is None:
        return Measurements(accuracy=accuracy)
    pairs = [(answer.prompt_ids, answer.completion_ids) for answer in answers]
    batch_size = config.evaluate.batch_size
    agreement = None
    if teacher is not None:
        agreement = agreement_with_teacher(
            model, teacher, pairs, batch_size=batch_size, progress=f"{name}: KL to teacher"
        )
    return Measurements(
        accuracy=accuracy,
        perplexity=completion_perplexity(
            model, pairs, batch_size=batch_size, progress=f"{name}: perplexity"
        ),
        agreement=agreement,
    )


def to_json(measurements: Measurements) -> dict:
    """Plain values; the inverse of `from_json`."""
    return asdict(measurements)


def from_json(values: dict) -> Measurements:
    """Measurements as `to_json` gave them."""
    return Measurements(
        accuracy=AccuracyResult(**values["accuracy"]) if values["accuracy"] else None,
        perplexity=Perplexity(**values["perplexity"]) if values["perplexity"] else None,
        agreement=Agreement(**values["agreement"]) if values["agreement"] else None,
    )
