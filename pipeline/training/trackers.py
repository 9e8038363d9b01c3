"""A tracker's run belongs to the run folder: after a restart it goes on, and no second one begins.

`tracker.json` in the run folder holds an id, made once. wandb reads it from WANDB_RUN_ID, and with
WANDB_RESUME=allow continues that run; trackio continues a run of the same name, so the name of
`run_name` holds it too. All stages of a run folder are one run there. What the user has set, in the
environment or as `run_name`, is left alone. A tracker whose package is missing is found before the
first stage, not by the trainer of a later one.

Left out: MLflow and Comet, whose servers give the ids; TensorBoard, the default, which has none:
its events lie in `tensorboard/<stage>/` of the run folder.
"""

import difflib
import os
import secrets
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from pipeline.artifacts import read_json, write_json
from pipeline.config import TRAINING_STAGES, Config

TRACKER_FILE = "tracker.json"
NEVER_LISTED = ("flyte", "azure_ml")
"""Trackers that transformers does not say it has, though it may."""


def uses_tracker(config: Config) -> bool:
    """Whether a stage of this run reports to a tracker."""
    stages = [stage for stage in config.run.stages if stage in TRAINING_STAGES]
    values = [getattr(config, stage).trl_values.get("report_to") for stage in stages]
    return any(value not in (None, "none", [], ["none"]) for value in values)


def tracker_faults(stage: str, arguments: TrainingArguments) -> list[str]:
    """What keeps the trackers of a stage from being used: a name nobody knows, a missing package.

    Args:
        stage: A training stage.
        arguments: Its arguments.

    Returns:
        One message for each.
    """
    installed = [*get_available_reporting_integrations(), *NEVER_LISTED]
    faults = []
    for name in arguments.report_to:
        if str(name) not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            why = f"no tracker that transformers knows; set {(near or ['tensorboard'])[0]} instead"
        elif name not in installed:
            why = f"not installed; pip install {name.replace('_', '-')}, or set tensorboard instead"
        else:
            continue
        faults.append(f"{stage}.report_to: {name}: {why}")
    return faults


def keep_tracker_run(root: Path) -> None:
    """Makes the id of a run folder where there is none, and tells it to wandb. Rank 0 alone.

    Args:
        root: The run folder.
    """
    if not (root / TRACKER_FILE).exists():
        write_json(root / TRACKER_FILE, {"id": secrets.token_hex(4)})
    os.environ.setdefault("WANDB_RUN_ID", tracker_id(root))
    os.environ.setdefault("WANDB_RESUME", "allow")


def tracker_id(root: Path) -> str | None:
    """The id of a run folder; None where no tracker is used."""
    path = root / TRACKER_FILE
    return read_json(path)["id"] if path.exists() else None


def run_name(root: Path) -> str | None:
    """The name of a run folder's run in a tracker; None where none is used."""
    identity = tracker_id(root)
    return None if identity is None else f"{root.resolve().name}-{identity}"
