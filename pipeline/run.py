"""Config -> run folder -> stages in order -> report. The same command goes on where it was.

A stage that is done is skipped, and one that was made by another config is refused or moved away
(`stages/provenance.py`).

On many ranks, rank 0 alone decides, prunes, evaluates and writes records (`ranks.py`).
"""

import logging
import resource
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from pipeline.artifacts import (
    RunFolder,
    git_commit,
    hash_file,
    hash_json,
    installed_versions,
    write_text,
)
from pipeline.config import Config
from pipeline.config_loading import to_yaml
from pipeline.disk_faults import disk_faults_named
from pipeline.errors import UserError
from pipeline.lock import is_taken_over, release_lock, take_lock
from pipeline.models.paths import resolve_model
from pipeline.ranks import is_main, join_ranks, on_main, stop_together, world_size
from pipeline.rules.batches import prompt_fault
from pipeline.stages import distill, evaluate, export, grpo, on_policy, prune, sweep
from pipeline.stages.inputs import (
    TaskInputs,
    check_models,
    check_teacher,
    device,
    open_task,
    student_source,
)
from pipeline.stages.interim import write_interim
from pipeline.stages.provenance import is_current, settle, stage_inputs
from pipeline.stages.training import end_step, max_steps, refining_stages
from pipeline.stopping import STATUS, Stopped, acting
from pipeline.training.arguments import check_trl_values
from pipeline.training.manifest import quick_fault
from pipeline.training.safe_loading import force_safe_loading
from pipeline.training.trackers import keep_tracker_run, uses_tracker

ON_RANK_0 = {
    "prune": prune.run,
    "evaluate": evaluate.run,
    "export": export.run,
    "sweep": sweep.run,
}
ON_EVERY_RANK = {"distill": distill.run, "on_policy": on_policy.run, "grpo": grpo.run}

logger = logging.getLogger(__name__)


def run(config: Config, *, output_dir: Path, resume: str = "auto") -> None:
    """Runs every stage of the config that is not done yet.

    Args:
        config: Checked configuration.
        output_dir: The run folder.
        resume: `auto`, `redo`, `never`, or the path of a checkpoint folder to resume from.

    Raises:
        UserError: Bad input, a folder whose stages were made by another config, or a disk that
            refuses what is written.
        Stopped: A signal asked for it; the run folder is as a resumed run needs it.
    """
    quiet_libraries()
    force_safe_loading()
    check_trl_values(config)
    check_models(config)
    inputs = open_inputs(config)
    fault = prompt_fault(config, len(inputs.task.train))
    if fault is not None:
        raise UserError(fault)
    join_ranks()
    folder = on_main(partial(RunFolder.open, output_dir))
    with disk_faults_named(folder.root):
        owner = on_main(partial(take_lock, folder.root))
    _log_to(folder.root / "log")
    status = 1
    try:
        with disk_faults_named(folder.root), acting(alone=world_size() == 1):
            if is_main():
                (folder.root / "exit_status").unlink(missing_ok=True)
            checkpoint = on_main(partial(resumed_checkpoint, config, folder, resume))
            on_main(partial(settle, config, folder, resume))
            _run_and_tell(config, folder, inputs, checkpoint)
        status = 0
    except UserError:
        status = 2
        raise
    except Stopped as stop:
        status = STATUS
        logger.info("stopped by %s; run the same command again to go on", stop)
        raise
    finally:
        if is_main():
            if not is_taken_over(folder.root):
                _leave_status(folder, status)
            release_lock(folder.root, owner)


def _leave_status(folder: RunFolder, status: int) -> None:
    """Writes `exit_status`; on a disk without space what ended the run stays the one message."""
    try:
        write_text(folder.root / "exit_status", f"{status}\n")
    except (OSError, UserError) as error:
        logger.warning("%s: no exit_status: %s", folder.root, error)


def _run_and_tell(
    config: Config, folder: RunFolder, inputs: TaskInputs, checkpoint: Path | None
) -> None:
    """Runs the stages, and leaves a page also where none of them made the report."""
    error = None
    try:
        _run_stages(config, folder, inputs, checkpoint)
    except BaseException as found:
        error = found
        raise
    finally:
        if is_main() and not is_taken_over(folder.root):
            write_interim(config, folder, inputs, error)


def _run_stages(
    config: Config, folder: RunFolder, inputs: TaskInputs, checkpoint: Path | None
) -> None:
    """Runs what is not done, in order.

    Raises:
        UserError: The first stage trains or exports a student that is not there.
    """
    first = config.run.stages[0]
    if first in ON_EVERY_RANK or first == "export":
        on_main(partial(student_source, folder, first))
    if is_main():
        write_text(folder.root / "config.yaml", to_yaml(config))
        if uses_tracker(config):
            keep_tracker_run(folder.root)
    for stage in config.run.stages:
        stop_together()
        if on_main(partial(is_current, stage, config, folder)):
            logger.info("%s: done before, skipped", stage)
            continue
        record = on_main(partial(_begin, stage, config, folder))
        started = time.monotonic()
        out = folder.stage(stage)
        if stage in ON_EVERY_RANK:
            from_here = checkpoint if checkpoint and checkpoint.parent.name == stage else None
            record |= asdict(ON_EVERY_RANK[stage](config, folder, inputs, out, from_here))
        else:
            on_main(partial(ON_RANK_0[stage], config, folder, inputs, out))
        seconds = record["seconds"] + time.monotonic() - started
        on_main(partial(_finish, stage, folder, record, seconds))
    logger.info("%s: %s", folder.root, ", ".join(f"{s} done" for s in config.run.stages))


def _begin(stage: str, config: Config, folder: RunFolder) -> dict[str, Any]:
    """Writes the record of a stage that begins or goes on."""
    old = folder.record(stage) or {}
    record: dict[str, Any] = {
        "stage": stage,
        "inputs": stage_inputs(stage, config, folder),
        "config_hash": hash_json(config.model_dump()),
        "versions": installed_versions(),
        "git_commit": git_commit(),
        "seed": config.run.seed,
        "device": device().type,
        "processes": world_size() if stage in ON_EVERY_RANK else 1,
        "seconds": old.get("seconds", 0.0),
        "done": False,
    }
    if stage in refining_stages(config):
        record["refine_end_step"] = end_step(config, folder)
        record["max_steps"] = max_steps(config, stage)
    folder.write_record(stage, record)
    logger.info("%s: %s", stage, "resumed" if old else "begins")
    return record


def _finish(stage: str, folder: RunFolder, record: dict[str, Any], seconds: float) -> None:
    """Writes the record of a stage that is done."""
    record |= {
        "outputs": _hashes(folder.stage(stage)),
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "done": True,
    }
    folder.write_record(stage, record)
    logger.info("%s: done in %.0f s", stage, record["seconds"])


def resumed_checkpoint(config: Config, folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint that `--resume PATH` names, None where it is not a path.

    Raises:
        UserError: It is not a whole one of an unfinished stage that this run is to go through.
    """
    if resume in ("auto", "redo", "never"):
        return None
    path = Path(resume).resolve()
    stage = path.parent.name
    if path.parent.parent != folder.root.resolve() or stage not in ON_EVERY_RANK:
        raise UserError(
            f"--resume: {resume!r} is not a checkpoint of this run; set a folder such as "
            f"{folder.stage('grpo') / 'checkpoint-100'}"
        )
    if folder.is_done(stage):
        raise UserError(f"--resume: {stage} is done in {folder.root}; set --resume auto or redo")
    if stage not in config.run.stages:
        raise UserError(
            f"--resume: {resume!r} is a checkpoint of {stage}, which is none of run.stages, "
            f"[{', '.join(config.run.stages)}]; add it there, or set --resume auto"
        )
    if (fault := quick_fault(path)) is not None:
        raise UserError(f"--resume: {path} is not whole ({fault}); set --resume auto")
    return path


def open_inputs(config: Config) -> TaskInputs:
    """Opens task and tokenizers, so that bad input is reported before the run folder is made.

    Raises:
        UserError: A path is wrong, a task file is broken, or the tokenizers differ.
    """
    resolve_model(config.teacher.path, "teacher.path")
    inputs = open_task(config)
    if config.run.stages != ["evaluate"]:
        check_teacher(config, inputs.tokenizer)
    return inputs


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of what later stages read: the model's weights, the mask, and what was measured."""
    files = [*folder.glob("model/*.safetensors"), *folder.glob("mask.safetensors")]
    files += folder.glob("metrics.json")
    return {str(file.relative_to(folder)): hash_file(file) for file in sorted(files)}


def quiet_libraries() -> None:
    """Keeps the terminal for what a user acts on.

    No bars for files of a second, no notices about names that TRL uses and transformers renames, or
    that DeepSpeed uses and torch renames, none about fonts that matplotlib has another one for.
    """
    disable_progress_bar()
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


class _AboveBars(logging.StreamHandler):
    """Writes above the progress bars that are open, not behind them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the bars away for the time of one message."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _log_to(path: Path) -> None:
    """Sends the pipeline's log to the terminal and, appended, to the run folder; rank 0 only."""
    handlers: list[logging.Handler] = [_AboveBars(sys.stderr)]
    if is_main():
        handlers.append(logging.FileHandler(path, delay=True))
    logging.basicConfig(
        level=logging.WARNING if is_main() else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.getLogger("pipeline").setLevel(logging.INFO if is_main() else logging.ERROR)
