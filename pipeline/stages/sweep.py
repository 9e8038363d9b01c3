"""Methods beside each other: every row of `sweep.rows` at every level, for every seed.

One cell is one one-shot student: pruned and measured as stage `prune` does it, and at
`sweep.recover_levels` trained by stage `distill` with its mask fixed, on the same completions and
in the same number of steps for every row. Each cell is a small JSON file in `cells/`, written when
it is finished, so that a sweep goes on where it was, and cells of several machines can be put into
one folder. A cell is run again when a key it depends on has changed. `table.md` and `plots/` show
all cells of the config.

KL is to the dense student, also where the teacher, who samples completions and trains, is another
model. A level that a row cannot have, such as any but 0.5 for 2:4, is left out.

Left out: several processes. Start one for each seed, with its own output folder.
"""

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder, git_commit, hash_json, write_json
from pipeline.config import Config, RefineConfig, sweep_levels, sweep_row
from pipeline.errors import UserError
from pipeline.evaluation.report import Measurements
from pipeline.evaluation.sweep_tables import write_sweep_report
from pipeline.evaluation.unigram import unigram_perplexity
from pipeline.lock import TakenOver
from pipeline.models.loading import load_model
from pipeline.models.prompts import encode_answer
from pipeline.models.prunable import prunable_weights
from pipeline.ranks import world_size
from pipeline.rules.prune import STRUCTURED
from pipeline.stages import distill, prune
from pipeline.stages.inputs import (
    TaskInputs,
    device,
    model_fingerprint,
    open_dense_student,
    open_task,
    open_teacher,
)
from pipeline.stages.measure import COMPLETIONS, measure, reference_completions

logger = logging.getLogger(__name__)

HARMLESS_KEYS = (
    ("teacher", "micro_batch_size"),
    ("teacher", "placement"),
    ("calibration", "batch_size"),
    ("evaluate", "batch_size"),
    ("evaluate", "num_samples"),
    ("evaluate", "every_steps"),
    ("evaluate", "patience"),
    ("evaluate", "sampled_completions"),
    ("evaluate", "pass_at_k"),
    ("evaluate", "temperature"),
    ("evaluate", "zero_shot"),
    ("evaluate", "num_fewshot"),
    ("evaluate", "zero_shot_path"),
    ("evaluate", "zero_shot_batch_size"),
)
"""Keys that change no number of a cell, but for `evaluate.batch_size`: sampling depends on it, so
other completions of the same teacher calibrate."""

Cell = dict[str, Any]


def run(config: Config, folder: RunFolder, inputs: TaskInputs, out: Path) -> None:
    """Runs every cell that is not there yet and writes tables and plots.

    Raises:
        UserError: Several processes were started, a row cannot be pruned, or there is no cell.
    """
    if world_size() > 1:
        raise UserError(
            f"run.stages: [sweep]: {world_size()} processes were started and a sweep uses one; "
            "start one process for each of sweep.seeds, with its own --output_dir, instead"
        )
    (out / "cells").mkdir(parents=True, exist_ok=True)
    dense = _dense_beside_teacher(config)
    reference = _reference(config, folder, inputs, dense)
    description = _description(config, inputs, reference, folder)
    models = hash_json(
        [model_fingerprint(config.student.path), model_fingerprint(config.teacher.path)]
    )
    cells = []
    for seed in config.sweep.seeds:
        cells += _cells_of_seed(config, seed, models, dense, out)
        write_sweep_report(out, cells, reference, description)
    if not cells:
        raise UserError(
            f"sweep.levels: {config.sweep.levels}: no row of sweep.rows can be pruned to one of "
            "them; set others, or another row"
        )
    write_json(
        out / "sweep.json", {"description": description, "reference": reference, "cells": cells}
    )
    logger.info("sweep: %d cells; tables and pictures: %s", len(cells), out / "table.md")


def _cells_of_seed(
    config: Config, seed: int, models: str, dense: PreTrainedModel | None, out: Path
) -> list[Cell]:
    """The cells of one seed, in the order of rows and levels."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    inputs = open_task(config)
    work = RunFolder.open(out / "work" / f"seed-{seed}")
    cells = []
    for label in config.sweep.rows:
        for level in sweep_levels(config, label):
            path = out / "cells" / f"{_file_name(label)}-{level:g}-{seed}.json"
            cells.append(_cell(config, inputs, work, label, level, models, dense, path))
    shutil.rmtree(work.root)
    return [cell for cell in cells if cell is not None]


def _cell(
    config: Config,
    inputs: TaskInputs,
    work: RunFolder,
    label: str,
    level: float,
    models: str,
    dense: PreTrainedModel | None,
    path: Path,
) -> Cell | None:
    """One cell, read where it is there; None where the row cannot have this level."""
    row = _row_config(config, label, level)
    depends_on = _depends_on(row, models)
    if path.exists():
        cell = json.loads(path.read_text())
        if cell["depends_on"] == depends_on:
            return cell
    logger.info("sweep: %s at %g, seed %d", label, level, row.run.seed)
    for stage in ("prune", "distill"):
        shutil.rmtree(work.stage(stage), ignore_errors=True)
    recovers = level in row.sweep.recover_levels
    try:
        pruned = _prune(row, work, inputs, dense, saves=recovers)
    except TakenOver:
        raise
    except UserError as error:
        if row.prune.method in STRUCTURED and str(error).startswith("prune.sparsity"):
            logger.info("sweep: left out: %s", error)
            return None
        raise UserError(f"sweep.rows.{label}: at {level:g}: {error}") from error
    cell = {
        "row": label,
        "prune": row.prune.model_dump(),
        "sparsity": level,
        "seed": row.run.seed,
        **pruned,
        "recovered": _recover(row, work, inputs, dense) if recovers else None,
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "depends_on": depends_on,
    }
    write_json(path, cell)
    return cell


def _row_config(config: Config, label: str, level: float) -> Config:
    """The config of one cell: its own `prune`, a mask that stays, the stages it goes through.

    Recovery takes the same number of steps for every student, so none of them is chosen or ends.
    """
    recovers = level in config.sweep.recover_levels
    stages = ["prune", "distill"] if recovers else ["prune"]
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"stages": stages}),
            "prune": sweep_row(config, label, level),
            "refine": RefineConfig(stages=[]),
            "evaluate": config.evaluate.model_copy(update={"every_steps": None, "patience": None}),
        }
    )


def _depends_on(row: Config, models: str) -> dict[str, Any]:
    """The keys whose change makes a cell stale, as one hash for each section."""
    sections = ["student", "teacher", "task", "calibration", "prune", "evaluate"]
    sections += ["distill"] if "distill" in row.run.stages else []
    values = row.model_dump()
    for section, key in HARMLESS_KEYS:
        del values[section][key]
    for key in ("text_subset", "text_split"):  # cells from before there were these are not stale
        if values["evaluate"][key] is None:
            del values["evaluate"][key]
    return {"seed": row.run.seed, "models": models, **{n: hash_json(values[n]) for n in sections}}


def _prune(
    row: Config, work: RunFolder, inputs: TaskInputs, dense: PreTrainedModel | None, saves: bool
) -> dict[str, Any]:
    """Prunes and measures, and writes the student down for a recovery."""
    found = prune.one_shot(row, work, inputs, dense)
    if saves:
        prune.save_start(found.student, found.masks, inputs, work.stage("prune"))
    return {
        "measured_sparsity": found.sparsity,
        "prune_seconds": found.seconds,
        "pruned": _numbers(found.measurements),
    }


def _recover(
    row: Config, work: RunFolder, inputs: TaskInputs, dense: PreTrainedModel | None
) -> dict[str, Any]:
    """Trains the one-shot student with its mask fixed, and measures it."""
    work.write_record("prune", {"done": True})
    started = time.monotonic()
    distill.run(row, work, inputs, work.stage("distill"))
    seconds = time.monotonic() - started
    student = load_model(str(work.stage("distill") / "model")).to(device())
    teacher = open_teacher(row)
    pairs = reference_completions(work, row, teacher, inputs)
    found = measure("recovered", student, row, inputs, dense or teacher, pairs)
    return {**_numbers(found), "steps": row.distill.trl_values["max_steps"], "seconds": seconds}


def _dense_beside_teacher(config: Config) -> PreTrainedModel | None:
    """The dense student; None where the teacher is the same model and serves as well."""
    student, teacher = (
        (values.path, values.revision, values.dtype) for values in (config.student, config.teacher)
    )
    return None if student == teacher else open_dense_student(config)


def _reference(
    config: Config, folder: RunFolder, inputs: TaskInputs, dense: PreTrainedModel | None
) -> dict[str, Any]:
    """The dense model, and a unigram model of the training answers, on the same completions."""
    teacher = open_teacher(config)
    dense = dense or teacher
    pairs = reference_completions(folder, config, teacher, inputs)
    found = measure("dense", dense, config, inputs, dense, pairs)
    tokenizer = inputs.tokenizer
    trained = [encode_answer(tokenizer, row.answer) for row in inputs.task.train]
    unigram = {
        "unigram_perplexity": unigram_perplexity(
            trained, [completion for _, completion in pairs], dense.config.vocab_size
        ),
        "unigram_text_perplexity": None,
    }
    if inputs.text_ids is not None:
        unigram["unigram_text_perplexity"] = unigram_perplexity(
            trained, [inputs.text_ids], dense.config.vocab_size
        )
    return {
        "dense": _numbers(found),
        **unigram,
        "prunable_weights": sum(weight.numel() for weight in prunable_weights(dense).values()),
        "num_prompts": found.accuracy.num_prompts,
        "num_tokens": found.perplexity.num_tokens,
        "perplexity_on": COMPLETIONS[config.evaluate.completions],
    }


def _numbers(found: Measurements) -> dict[str, float | None]:
    """What the tables show of one model; null: not finite, or not measured."""
    return {
        "accuracy": found.accuracy.accuracy,
        "kl": found.agreement.kl,
        "top1": found.agreement.top1,
        "perplexity": found.perplexity.value,
        "text_perplexity": found.text_perplexity and found.text_perplexity.value,
    }


def _description(
    config: Config, inputs: TaskInputs, reference: dict[str, Any], folder: RunFolder
) -> dict[str, Any]:
    """What the page says beside the numbers."""
    sweep, calibration = config.sweep, config.calibration
    return {
        "title": f"One-shot pruning of {config.student.path}",
        "command": f"python launch/train.py --config {folder.root / 'config.yaml'}",
        "headline_row": sweep.headline or next(iter(sweep.rows)),
        "model": f"{config.student.path}, {reference['prunable_weights']:,} prunable weights",
        "teacher": config.teacher.path,
        "calibration": f"{len(inputs.task.calibration)} rows, source {calibration.source}"
        + (", but for those the teacher got wrong" if calibration.source == "rollouts" else ""),
        "commit": git_commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _file_name(label: str) -> str:
    """A label as part of a file name; labels that would meet are told apart by a hash."""
    plain = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return f"{plain}-{hash_json(label)[:6]}"
