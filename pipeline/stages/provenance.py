"""What a stage's result depends on, and whether results on disk still belong to a config.

The inputs of a stage are the config keys it reads and the hashes of its input files. They are
compared with those it was begun with: same and done, the stage is skipped; same and not done, it
resumes; changed, it is refused or, with `--resume redo`, moved to `old/` and run again.
"""

import logging
from typing import Any

from pipeline.artifacts import STAGES, RunFolder, changed_inputs
from pipeline.config import TRAINING_STAGES, Config
from pipeline.errors import UserError
from pipeline.stages.inputs import data_fingerprint, model_fingerprint, stage_before

SECTIONS_READ = {
    "prune": ("student", "teacher", "task", "calibration", "prune"),
    "distill": ("teacher", "task", "distill", "movement", "refine", "lora"),
    "on_policy": ("teacher", "task", "on_policy", "movement", "refine"),
    "grpo": ("teacher", "task", "grpo", "rewards", "movement", "refine", "lora"),
    "evaluate": ("student", "teacher", "task", "evaluate"),
    "export": ("student", "teacher", "export"),
    "sweep": ("student", "teacher", "task", "calibration", "prune", "distill", "evaluate", "sweep"),
}
"""Config sections whose keys are inputs of a stage."""

_HELDOUT = (("evaluate", "every_steps"), ("evaluate", "patience"), ("evaluate", "max_new_tokens"))
KEYS_READ = {
    "prune": (("refine", "start_sparsity"), ("evaluate", "max_new_tokens")),
    "distill": (("prune", "sparsity"), *_HELDOUT),
    "on_policy": (("prune", "sparsity"), *_HELDOUT),
    "grpo": (("prune", "sparsity"), *_HELDOUT),
    "evaluate": (("prune", "sparsity"),),
    "export": (("prune", "method"), ("prune", "redistribution"), ("prune", "width_multiple")),
    "sweep": (),
}
"""Single keys of other sections that are inputs too."""

FILES_READ = {"task": "path", "calibration": "text_path", "evaluate": "text_path"}
"""Keys of sections that name data. What of it is on disk is an input by its bytes; the rest stands
for itself."""

VERIFYING_KEYS = (
    ("rewards", "functions"),
    ("rewards", "weights"),
    ("rewards", "sparsity_weight"),
    ("rewards", "teacher_kl_weight"),
    ("evaluate", "max_new_tokens"),
)
"""Inputs too of the stages that train, under refine.verify."""

HARMLESS_KEYS = {
    "teacher.micro_batch_size",
    "teacher.placement",
    "calibration.batch_size",
    "evaluate.batch_size",
    "evaluate.zero_shot_batch_size",
    "grpo.on_trouble",
}
BATCH_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
)
"""How the rows of a step are shared out among ranks."""

HARMLESS_PREFIXES = ("logging_", "log_", "report_to", "disable_tqdm", "save_", "run_name", "hub_")
HARMLESS_PREFIXES += ("vllm_server_", "vllm_group_port")  # another node after a requeue
"""Keys that change no result: a stage with results does not mind them."""

logger = logging.getLogger(__name__)


def stage_inputs(stage: str, config: Config, folder: RunFolder) -> dict[str, Any]:
    """What a stage's result depends on: dotted config keys and hashes of files."""
    keys: dict[str, Any] = {"run.seed": config.run.seed}
    for section in SECTIONS_READ[stage]:
        for key, value in getattr(config, section).model_dump().items():
            name = f"{section}.{key}"
            if name not in HARMLESS_KEYS and not key.startswith(HARMLESS_PREFIXES):
                keys[name] = value
            if key == FILES_READ.get(section) and value and (files := data_fingerprint(value)):
                keys[f"files of {name}"] = files
    verifies = stage in TRAINING_STAGES and config.refine.verify
    for section, key in KEYS_READ[stage] + (VERIFYING_KEYS if verifies else ()):
        keys[f"{section}.{key}"] = getattr(getattr(config, section), key)
    if stage in ("prune", "sweep"):
        for role in ("student", "teacher"):
            keys[f"files of {role}.path"] = model_fingerprint(getattr(config, role).path)
    earlier = STAGES[: STAGES.index(stage)]
    keys["files of earlier stages"] = {
        name: (folder.record(name) or {}).get("outputs") for name in earlier if folder.is_done(name)
    }
    if stage == "evaluate" and stage_before(folder, stage) is None:  # it measures student.path
        keys["files of earlier stages"] |= {
            role: model_fingerprint(getattr(config, role).path) for role in ("student", "teacher")
        }
    return keys


def settle(config: Config, folder: RunFolder, resume: str) -> None:
    """Makes sure that no stage with results was made by another config; `redo` moves such away."""
    _check_origin(config, folder)
    stage = stage_to_redo(config, folder, resume)
    if stage is not None:
        later = [name for name in STAGES[STAGES.index(stage) :] if folder.stage(name).exists()]
        logger.info("moved %s to %s", ", ".join(later), folder.move_to_old(later))


def _check_origin(config: Config, folder: RunFolder) -> None:
    """Keeps the model that a command names apart from the students of another one.

    Raises:
        UserError: The folder's student was pruned from another model and is not pruned anew.
    """
    record = None if "prune" in config.run.stages else folder.record("prune")
    pruned = (record or {}).get("inputs", {}).get("student.path", config.student.path)
    if pruned != config.student.path:
        raise UserError(
            f"student.path: {config.student.path!r}: {folder.root} holds students pruned from "
            f"{pruned!r}; set another --output_dir to measure this model, or that student.path"
        )


def stage_to_redo(config: Config, folder: RunFolder, resume: str) -> str | None:
    """The first stage whose results were made by another config, under `redo`; else None.

    Raises:
        UserError: One was and `resume` does not allow to redo it; nothing on disk has changed.
    """
    begun = [stage for stage in STAGES if folder.record(stage)]
    if resume == "never" and begun:
        raise UserError(
            f"--output_dir: {folder.root} already holds {', '.join(begun)} and --resume is never; "
            "set another --output_dir, or --resume auto to go on"
        )
    to_run: list[str] = []
    for stage in config.run.stages:
        record = folder.record(stage)
        if record is None:
            to_run.append(stage)
            continue
        changes = changed_inputs(
            _comparable(record["inputs"], stage, record["done"]),
            _comparable(stage_inputs(stage, config, folder), stage, record["done"]),
        )
        if to_run and stage in TRAINING_STAGES:
            changes.append(f"its student: before {', '.join(to_run)} -> after")
        if not changes:
            continue
        if resume != "redo":
            raise UserError(
                f"{stage}: {folder.root} holds results of another config ({'; '.join(changes)}); "
                "set another --output_dir, or --resume redo to move this stage and the later ones "
                f"to {folder.root / 'old'} and run them again"
            )
        return stage
    return None


def _comparable(inputs: dict[str, Any], stage: str, done: bool) -> dict[str, Any]:
    """Inputs whose change is a conflict.

    `max_steps` of an unfinished stage may be raised, and its batch shared out in another way
    (`training/topology_change.py` counts the rows); report and export are made anew when a stage
    before them has run since, and a sweep knows which of its cells a change concerns.
    """
    if stage == "sweep":
        return {}
    ignored = set() if done else {f"{stage}.{key}" for key in ("max_steps", *BATCH_KEYS)}
    if stage in ("evaluate", "export"):
        ignored.add("files of earlier stages")
    return {key: value for key, value in inputs.items() if key not in ignored}


def is_current(stage: str, config: Config, folder: RunFolder) -> bool:
    """Whether a stage is done and nothing it reads has changed since."""
    record = folder.record(stage)
    return bool(
        record and record["done"] and record["inputs"] == stage_inputs(stage, config, folder)
    )
