"""What a report says beside measurements, from the config and the records of the stages."""

import json
from shlex import quote
from typing import Any

from pipeline.artifacts import STAGES, RunFolder, git_commit, hash_json, installed_versions
from pipeline.config import TRAINING_STAGES, Config
from pipeline.stages.inputs import TaskInputs
from pipeline.stages.training import REFINEMENTS_FILE


def asked(config: Config, folder: RunFolder, inputs: TaskInputs) -> dict[str, str]:
    """What was asked for, in words."""
    told = {
        "Student": config.student.path,
        "Teacher": config.teacher.path,
        "Task": f"{inputs.task.name}, {len(inputs.task.train)} training prompts",
    }
    if config.run.stages == ["sweep"]:
        sweep = config.sweep
        told["Rows"] = ", ".join(sweep.rows)
        told["Sparsities"] = ", ".join(f"{level:g}" for level in sweep.levels)
        told["Seeds"] = ", ".join(map(str, sweep.seeds))
    else:
        told["Pruning"] = f"{config.prune.method}, redistribution {config.prune.redistribution}"
        told["Sparsity"] = f"{config.prune.sparsity:g} of the prunable weights"
    return told | {"Stages": ", ".join(_stages(config, folder))}


def command(config: Config, folder: RunFolder) -> str:
    """What makes this run again, also one whose stages ran in several commands."""
    told = f"accelerate launch launch/train.py --config {quote(str(folder.root / 'config.yaml'))}"
    stages = _stages(config, folder)
    return told if stages == config.run.stages else f"{told} --stages {','.join(stages)}"


def _stages(config: Config, folder: RunFolder) -> list[str]:
    """Those of this command and those that were done before, in order."""
    return [name for name in STAGES if name in config.run.stages or folder.is_done(name)]


def settings(config: Config) -> dict[str, Any]:
    """Dotted keys that are not the default, TRL's among them, to their values."""
    default, found = Config().model_dump(), config.model_dump()
    return {
        f"{section}.{key}": value
        for section, values in found.items()
        for key, value in values.items()
        if key not in default[section] or default[section][key] != value
    }


def facts(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Keyword arguments of `build_report`: what the mask went through, cost, provenance."""
    records = {name: folder.record(name) for name in STAGES}
    done = {name: record for name, record in records.items() if record and record["done"]}
    peaks = [r["peak_memory_bytes"] for r in done.values() if "peak_memory_bytes" in r]
    return {
        "refinement": _refinements(folder),
        "heldout": {
            name: {"steps": record["steps"], **record["student"]}
            for name, record in done.items()
            if record.get("student")
        },
        "topology_changes": [
            {"stage": name, **change}
            for name, record in done.items()
            for change in record.get("topology_changes", [])
        ],
        "timing": {name: record["seconds"] for name, record in done.items()},
        "cost": {name: _cost(record) for name, record in done.items() if "device" in record},
        "peak_memory_bytes": max(peaks, default=None),
        "versions": installed_versions(),
        "seed": config.run.seed,
        "git_commit": git_commit(),
        "config_hash": hash_json(config.model_dump()),
    }


def _refinements(folder: RunFolder) -> list[dict] | None:
    """What the training stages did to the mask, in order; None where there is no list of it."""
    files = [folder.stage(stage) / REFINEMENTS_FILE for stage in TRAINING_STAGES]
    lists = [json.loads(file.read_text()) for file in files if file.exists()]
    return [entry for entries in lists for entry in entries] if lists else None


def _cost(record: dict[str, Any]) -> dict[str, Any]:
    """What a finished stage took, beside time."""
    hours = record["seconds"] * record["processes"] / 3600
    cost = {"device": record["device"], "processes": record["processes"], "device_hours": hours}
    return cost | ({"tokens": record["tokens"]} if "tokens" in record else {})
