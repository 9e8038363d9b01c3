"""What every stage opens first: the task, its prompts as tokens, and the student so far."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import RunFolder, hash_file, replaced_folder
from pipeline.config import TRAINING_STAGES, Config, EvaluateConfig
from pipeline.data.tasks import Task, load_task
from pipeline.data.text import load_text
from pipeline.errors import UserError
from pipeline.evaluation.harness import HarnessTasks, open_harness_tasks
from pipeline.evaluation.text_perplexity import text_windows
from pipeline.models.loading import (
    check_model,
    check_same_tokenizer,
    load_architecture,
    load_model,
    load_tokenizer,
)
from pipeline.models.paths import resolve_model
from pipeline.models.prompts import Prompt, encode_prompt, format_prompt
from rewards.correctness import Verifier, find_verifier

TRAINED_STAGES = ("prune", *TRAINING_STAGES)


@dataclass(frozen=True)
class TaskInputs:
    """A task as models see it."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    format: Callable[[str], Prompt]
    """Row prompt to what TRL takes."""
    encode: Callable[[str], list[int]]
    """Row prompt to token ids."""
    text_ids: list[int] | None = None
    """Tokens of `evaluate.text_path`; None where it is not set."""
    harness: HarnessTasks | None = None
    """The tasks of `evaluate.zero_shot`; None where there are none."""


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def open_task(config: Config) -> TaskInputs:
    """Loads the task, the student's tokenizer, and what evaluation looks at beside the task.

    Raises:
        UserError: The task, its verifier or the tokenizer cannot be loaded, the padding token has
            no embedding, the text is shorter than one window, or a zero-shot task is unknown.
    """
    values = config.task
    task = load_task(
        values.path,
        subset=values.subset,
        prompt_column=values.prompt_column,
        answer_column=values.answer_column,
        num_train=values.num_train,
        num_calibration=values.num_calibration,
        num_probe=values.num_probe,
        num_test=values.num_test,
        seed=config.run.seed,
    )
    student = config.student
    tokenizer = load_tokenizer(
        student.path, revision=student.revision, trust_remote_code=student.trust_remote_code
    )
    if tokenizer.pad_token_id >= _student_architecture(config).vocab_size:
        raise UserError(
            f"student.path: the model {student.path!r} has no embedding for its padding token "
            f"{tokenizer.pad_token!r}, number {tokenizer.pad_token_id}; save the tokenizer with "
            "another pad_token, or the model after resize_token_embeddings()"
        )
    try:
        verifier = find_verifier(values.verifier, values.time_limit_seconds)
    except ValueError as error:
        raise UserError(f"task.verifier: {error}") from error
    answer = task.test[0].answer
    if verifier(answer, answer) < 1:
        raise UserError(
            f"task.verifier: {values.verifier!r} does not accept the answer {answer[:80]!r} as its "
            "own completion, so nothing would ever be right; set a verifier that fits the answers"
        )
    form = partial(format_prompt, tokenizer, instruction=values.instruction)
    evaluate = config.evaluate
    return TaskInputs(
        task,
        tokenizer,
        verifier,
        form,
        lambda prompt: encode_prompt(tokenizer, form(prompt)),
        _text_ids(evaluate, tokenizer) if evaluate.text_path else None,
        open_harness_tasks(evaluate.zero_shot, evaluate.zero_shot_path, evaluate.num_fewshot)
        if evaluate.zero_shot
        else None,
    )


def _text_ids(values: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of `evaluate.text_path`, which fill one window at least."""
    text = load_text(
        values.text_path, "evaluate.text_", subset=values.text_subset, split=values.text_split
    )
    token_ids = tokenizer(text, verbose=False)["input_ids"]
    key = f"evaluate.text_path: {values.text_path!r}"
    text_windows(token_ids, seq_len=values.text_seq_len, stride=values.text_stride, key=key)
    return token_ids


def check_models(config: Config) -> None:
    """Makes sure that student and teacher are Llamas with weights, as far as no weight is read.

    Raises:
        UserError: One is not.
    """
    for role in ("student", "teacher"):
        values = getattr(config, role)
        check_model(
            values.path,
            key=f"{role}.path",
            revision=values.revision,
            trust_remote_code=getattr(values, "trust_remote_code", False),
        )


def check_teacher(config: Config, student_tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes sure that the teacher shares the student's vocabulary.

    Raises:
        UserError: Its tokenizer cannot be loaded or differs, or one model's head has entries that
            the other's lacks.
    """
    values = config.teacher
    tokenizer = load_tokenizer(values.path, key="teacher.path", revision=values.revision)
    check_same_tokenizer(student_tokenizer, tokenizer)
    student = _student_architecture(config).vocab_size
    teacher = load_architecture(
        values.path, key="teacher.path", revision=values.revision
    ).vocab_size
    if student != teacher:
        raise UserError(
            f"teacher.path: the heads of student and teacher have {student} and {teacher} entries, "
            "which a KL compares one by one; set a teacher whose config.json has the student's "
            "vocab_size"
        )


def _student_architecture(config: Config) -> PretrainedConfig:
    values = config.student
    return load_architecture(
        values.path, revision=values.revision, trust_remote_code=values.trust_remote_code
    )


def open_teacher(config: Config) -> PreTrainedModel:
    """Loads the frozen teacher.

    Raises:
        UserError: It cannot be loaded.
    """
    values = config.teacher
    teacher = load_model(
        values.path, key="teacher.path", revision=values.revision, dtype=values.dtype
    )
    return teacher.requires_grad_(False).to(device())


def open_dense_student(config: Config) -> PreTrainedModel:
    """Loads `student.path`, the student before pruning."""
    values = config.student
    return load_model(
        values.path,
        revision=values.revision,
        dtype=values.dtype,
        trust_remote_code=values.trust_remote_code,
    ).to(device())


def model_fingerprint(path: str) -> dict[str, str] | str:
    """Hashes of a local model's files; a Hub id stands for itself with its revision."""
    folder = Path(resolve_model(path, "student.path"))
    if not folder.is_dir():
        return path
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    return {file.name: _hash(file) for file in sorted(files)}


def data_fingerprint(path: str) -> dict[str, str]:
    """Hashes of a local file or of all files in a folder; empty for `bundled` and the Hub."""
    local = Path(path).expanduser()
    files = [local] if local.is_file() else sorted(local.rglob("*"))
    return {str(file.relative_to(local.parent)): _hash(file) for file in files if file.is_file()}


def _hash(file: Path) -> str:
    status = file.stat()
    return _hash_once(file.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _hash_once(file: Path, size: int, mtime_ns: int) -> str:
    """A process asks several times for the hash of files that may have many gigabytes."""
    return hash_file(file)


def stage_before(folder: RunFolder, stage: str) -> str | None:
    """The last finished stage before `stage` that left a student."""
    earlier = (
        TRAINED_STAGES[: TRAINED_STAGES.index(stage)] if stage in TRAINED_STAGES else TRAINED_STAGES
    )
    return next((name for name in reversed(earlier) if folder.is_done(name)), None)


def student_source(folder: RunFolder, stage: str) -> Path:
    """The folder of the last finished stage before `stage`: its student is in `model/`.

    Raises:
        UserError: There is none.
    """
    before = stage_before(folder, stage)
    if before is None:
        raise UserError(
            f"run.stages: {stage} needs a pruned student and {folder.root} holds none; set "
            f"--stages prune,{stage}"
        )
    return folder.stage(before)


def open_student(config: Config, folder: RunFolder, stage: str) -> tuple[PreTrainedModel, Path]:
    """Loads the model that the stage before left.

    Under ZeRO-3 transformers loads it in pieces when the stage's training arguments exist already.

    Returns:
        The model, and the folder that holds its masks and movement.

    Raises:
        UserError: No stage before this one has finished.
    """
    source = student_source(folder, stage)
    return load_model(str(source / "model"), dtype=config.student.dtype), source


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes `out/model/`, whole or not at all. `state_dict`: instead of the model's own."""
    with replaced_folder(out / "model") as temporary:
        model.save_pretrained(temporary, state_dict=state_dict)
        tokenizer.save_pretrained(temporary)
