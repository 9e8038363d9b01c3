"""The teacher's completions: sampled once, kept in `rollouts/` with what they come from.

That is the config's keys, and what these stand for: the rows themselves, the first prompt as tokens
(the student's tokenizer and chat template), and the hashes of the teacher's files that the run's
first stage took.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder, hash_json
from pipeline.config import Config
from pipeline.data.tasks import Row
from pipeline.rollouts import (
    Rollout,
    load_rollouts,
    sample_rollouts,
    sample_verified_rollouts,
    save_rollouts,
)
from pipeline.stages.inputs import TaskInputs


def cached_rollouts(
    folder: RunFolder,
    name: str,
    config: Config,
    teacher: PreTrainedModel | Callable[[], PreTrainedModel],
    inputs: TaskInputs,
    rows: list[Row],
    *,
    num_rollouts: int,
    temperature: float,
    max_new_tokens: int,
    progress: str,
    verified: bool = False,
) -> list[Rollout]:
    """The teacher's completions from `rollouts/<name>.jsonl`, sampled where the file has others.

    Args:
        folder: The run folder.
        name: File name without ending.
        config: Says which teacher and task they come from.
        teacher: Samples them; or what opens it, called only where they must be sampled.
        inputs: Tokenizer, encoding and verifier.
        rows: Prompts, used again from the start when all had their turn.
        num_rollouts: How many completions; at most one for each row where `verified`.
        temperature: 0 is greedy.
        max_new_tokens: Longest completion.
        progress: Name of the progress bar.
        verified: Only right ones, see `sample_verified_rollouts`.
    """
    path = folder.root / "rollouts" / f"{name}.jsonl"
    provenance = {
        "teacher": config.teacher.model_dump(exclude={"micro_batch_size", "placement"}),
        "teacher_files": _teacher_files(folder),
        "task": config.task.model_dump(),
        "rows": hash_json([(row.prompt, row.answer) for row in rows[:num_rollouts]]),
        "first_prompt": inputs.encode(rows[0].prompt),
        "seed": config.run.seed,
        "num_rollouts": num_rollouts,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "verified": verified,
    }
    if path.exists():
        found, rollouts = load_rollouts(path)
        if found == provenance:
            return rollouts
    arguments = {
        "max_new_tokens": max_new_tokens,
        "batch_size": config.evaluate.batch_size,
        "temperature": temperature,
        "seed": config.run.seed,
        "progress": progress,
    }
    model = teacher if isinstance(teacher, PreTrainedModel) else teacher()
    models = (model, inputs.tokenizer)
    checks = (inputs.encode, inputs.verifier)
    if verified:
        rollouts = sample_verified_rollouts(*models, rows[:num_rollouts], *checks, **arguments)
    else:
        rollouts = sample_rollouts(*models, rows, *checks, num_rollouts=num_rollouts, **arguments)
    path.parent.mkdir(exist_ok=True)
    save_rollouts(path, rollouts, provenance)
    return rollouts


def _teacher_files(folder: RunFolder) -> Any:
    """Hashes of the teacher's files, as prune, or evaluate by itself, noted them."""
    prune, evaluate = (
        (folder.record(stage) or {}).get("inputs", {}) for stage in ("prune", "evaluate")
    )
    return prune.get("files of teacher.path") or evaluate.get("files of earlier stages", {}).get(
        "teacher"
    )
