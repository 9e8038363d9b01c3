"""What a config names on disk, looked for at once: no torch is imported, nothing is read.

Left out: what is on the Hub, and whether a file holds what it should; both are found before the run
folder is made.
"""

from collections.abc import Callable
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.data.tasks import check_source
from pipeline.data.text import check_text_source
from pipeline.errors import UserError
from pipeline.models.paths import resolve_model


def check_paths(config: Config) -> None:
    """Makes sure that local models, task and texts are there.

    Raises:
        ConfigError: Every path that is not.
    """
    models = {"student.path": config.student.path, "teacher.path": config.teacher.path}
    calibration, evaluate = config.calibration, config.evaluate
    faults = [_fault(resolve_model, path, key) for key, path in models.items()]
    faults.append(_fault(check_source, config.task.path))
    if evaluate.text_path is not None:
        faults.append(_fault(check_text_source, evaluate.text_path, "evaluate.text_path"))
    if evaluate.zero_shot_path is not None:
        faults.append(_fault(_check_folder, evaluate.zero_shot_path, "evaluate.zero_shot_path"))
    if calibration.source == "text" and calibration.text_path is not None:
        faults.append(_fault(_check_text, calibration.text_path, "calibration.text_path"))
    lines = [fault for fault in faults if fault is not None]
    if lines:
        raise ConfigError("\n".join(lines))


def _fault(check: Callable, *arguments: str) -> str | None:
    """The message of a check that fails."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None


def _check_text(path: str, key: str) -> None:
    if not Path(path).expanduser().is_file():
        raise UserError(f"{key}: {path!r} is no file; set a text file, or JSON lines with text")


def _check_folder(path: str, key: str) -> None:
    if not Path(path).expanduser().is_dir():
        raise UserError(f"{key}: {path!r} is no folder; set the one with the tasks' YAML files")
