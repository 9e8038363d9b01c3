"""What training stages logged, from disk: the whole log history, or the newest checkpoint's."""

import json
import math

from pipeline.artifacts import RunFolder
from pipeline.config import TRAINING_STAGES

LOG_FILE = "log_history.json"
STATE_FILE = "trainer_state.json"
"""Of a checkpoint, which holds the log of a stage that is not done."""


def training_logs(folder: RunFolder) -> dict[str, list[dict]]:
    """Log history by stage; of a stage that is not done, that of its newest checkpoint."""
    logs = {}
    for stage in TRAINING_STAGES:
        path = folder.stage(stage) / LOG_FILE
        found = folder.stage(stage).glob("checkpoint-*")
        steps = [p.name.partition("-")[2] for p in found if (p / STATE_FILE).exists()]
        newest = max(map(int, filter(str.isdecimal, steps)), default=None)
        if path.exists():
            logs[stage] = json.loads(path.read_text())
        elif newest is not None:
            state = folder.stage(stage) / f"checkpoint-{newest}" / STATE_FILE
            logs[stage] = [finite_logs(e) for e in json.loads(state.read_text())["log_history"]]
    return logs


def finite_logs(logs: dict[str, float | None]) -> dict[str, float]:
    """Logs without what JSON cannot hold, such as the gradient norm of a skipped step.

    TRL logs None for a metric that was never finite.
    """
    return {key: value for key, value in logs.items() if value is not None and math.isfinite(value)}
