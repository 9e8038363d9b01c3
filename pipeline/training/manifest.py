"""What makes a folder whole: `manifest.json` lists every file with its size and SHA-256.

The manifest is written last, after every file has reached the disk, so a folder without one was
interrupted. Ranks share the reading: each takes every n-th file, with a few threads, and all learn
the result. Every rank calls what is here.

Left out: files beside those listed, such as notes of a user, which nothing reads.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.artifacts import hash_file, write_json
from pipeline.ranks import gather_from_all, is_local_main, is_main, on_main, rank, world_size

MANIFEST_FILE = "manifest.json"
NUM_THREADS = 8


def write_manifest(folder: Path) -> None:
    """Flushes every file of a folder to the disk and lists it.

    Each machine flushes all files, because it alone has what its own ranks wrote.

    Raises:
        UserError: On every rank, where another process has taken the run over.
    """
    names = on_main(lambda: _file_names(folder))
    if is_local_main():
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(flush, (folder / name for name in names)))
    gather_from_all(None)
    sizes = {name: (folder / name).stat().st_size for name in names if is_main()}
    digests = _digests(folder, names)
    on_main(
        lambda: write_json(
            folder / MANIFEST_FILE,
            {"files": {name: {"bytes": sizes[name], "sha256": digests[name]} for name in names}},
        )
    )
    if is_main():
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                flush(path)


def find_fault(folder: Path) -> str | None:
    """What keeps a folder from being whole, or None; reads every byte.

    Returns:
        The first fault, with the name of its file; the same on every rank.
    """
    fault = on_main(lambda: quick_fault(folder))
    if fault is not None:
        return fault
    entries = on_main(lambda: _entries(folder))
    digests = _digests(folder, list(entries))
    for name, entry in entries.items():
        if digests[name] != entry["sha256"]:
            return f"{name} is not what was written: its checksum differs"
    return None


def quick_fault(folder: Path) -> str | None:
    """As `find_fault`, from names and sizes alone, on one rank: misses changed bytes."""
    if not (folder / MANIFEST_FILE).exists():
        return f"no {MANIFEST_FILE}: interrupted while saving, or saved by an older version"
    try:
        entries = _entries(folder)
        expected = {name: int(entry["bytes"]) for name, entry in entries.items()}
        assert all(isinstance(entry["sha256"], str) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return f"{MANIFEST_FILE} is damaged"
    for name, size in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def flush(path: Path) -> None:
    """Has the disk keep a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> dict[str, dict]:
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of each file; one that cannot be read has an empty one."""

    def digest(name: str) -> str:
        try:
            return hash_file(folder / name)
        except OSError:
            return ""

    mine = names[rank() :: world_size()]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = dict(zip(mine, pool.map(digest, mine), strict=True))
    return {name: text for part in gather_from_all(found) for name, text in part.items()}
