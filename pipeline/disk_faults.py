"""What a disk refuses, told from faults of the program: no space or quota, no permission.

Python names the reason. safetensors writes it into its text. torch names none, so with less than
`SPACE_LEFT` it was the space. Left out: what goes wrong with files that are only read.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError

SPACE_LEFT = 1 << 20
"""Bytes."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_faults_named(folder: Path) -> Iterator[None]:
    """Turns what the disk of a run folder refuses into the one message of a run.

    Raises:
        UserError: Instead of such an exception; any other goes through.
    """
    try:
        yield
    except Exception as error:
        if is_full(error, folder):
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"--output_dir: {folder}: no space left ({free:,} bytes are free there; caches and "
                "temporary files need some too); make room and run the same command again to go on"
            ) from error
        if isinstance(error, OSError) and error.errno in NO_PERMISSION and _is_in(error, folder):
            raise UserError(
                f"--output_dir: {error.filename} cannot be written ({error.strerror}); have it be "
                "yours, or set another --output_dir"
            ) from error
        raise


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether writing below a folder failed for want of space, or of quota."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    if any(f"os error {code}" in str(error) for code in NO_SPACE):
        return True
    return "inline_container" in str(error) and shutil.disk_usage(folder).free < SPACE_LEFT


def _is_in(error: OSError, folder: Path) -> bool:
    return error.filename is not None and Path(error.filename).is_relative_to(folder)
