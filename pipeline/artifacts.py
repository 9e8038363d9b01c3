"""The run folder: stage records, atomic writes, and what a change of config may not touch.

A stage's inputs are the config keys it reads and the hashes of its input files. Same inputs: the
stage is skipped when done and resumed when not. Changed inputs of a stage that left results are
refused, or moved to `old/<time>/` with `--resume redo`. Nothing is written into a folder whose lock
another process has taken over. Knows nothing of models; imports no torch.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.lock import check_lock

STAGES = ("prune", "distill", "on_policy", "grpo", "evaluate", "export", "sweep")
RECORD_FILE = "stage.json"
MASK_FILE = "mask.safetensors"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "deepspeed",
    "lm-eval",
)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part.

    Raises:
        UserError: It is in a run folder that another process has taken over.
    """
    check_lock(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        UserError: It is damaged: we leave no part of a file, but a disk or an editor may.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"--output_dir: {path} is damaged ({error}); delete it to have it made anew, or set "
            "another --output_dir"
        ) from None


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends without an exception.

    Raises:
        UserError: It is in a run folder that another process has taken over, before or meanwhile.
    """
    check_lock(path)
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    check_lock(path)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, as far as installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of this repository, with `+changes` when the tree differs; None outside git.

    Without git's optional lock, which a run stopped meanwhile would leave behind.
    """
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/` and the records of its stages."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """Creates the folder where needed and makes sure that it can be written.

        Raises:
            UserError: It cannot.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--output_dir: {str(root)!r} cannot be written ({error.strerror}); set a folder "
                "you may write to"
            ) from error
        return cls(root)

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        return self.root / name

    def record(self, name: str) -> dict[str, Any] | None:
        """A stage's record, or None when it never began."""
        path = self.stage(name) / RECORD_FILE
        return read_json(path) if path.exists() else None

    def is_done(self, name: str) -> bool:
        """Whether a stage has finished."""
        record = self.record(name)
        return bool(record and record["done"])

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Writes a stage's record."""
        self.stage(name).mkdir(parents=True, exist_ok=True)
        write_json(self.stage(name) / RECORD_FILE, record)

    def move_to_old(self, names: list[str]) -> Path:
        """Moves folders of stages, or inside them, to `old/<time>/`, overwriting nothing."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target, count = self.root / "old" / stamp, 1
        while target.exists():
            target, count = self.root / "old" / f"{stamp}-{count}", count + 1
        target.mkdir(parents=True)
        for name in names:
            if self.stage(name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.stage(name), target / name)
        return target


def changed_inputs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys whose values differ, each as `key: old -> new`."""
    missing = object()
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
