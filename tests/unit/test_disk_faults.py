"""A disk that refuses is one message with a remedy; what else goes wrong is not touched."""

from pathlib import Path

import pytest

from pipeline.disk_faults import disk_faults_named
from pipeline.errors import UserError


def told(folder, act):
    """The message that a fault becomes."""
    with pytest.raises(UserError) as caught, disk_faults_named(folder):
        act()
    return str(caught.value)


def test_no_space_is_named_with_what_is_free(tmp_path):
    message = told(tmp_path, lambda: Path("/dev/full").write_text("a"))
    assert message.startswith(f"--output_dir: {tmp_path}: no space left (")
    assert message.endswith("make room and run the same command again to go on")


def test_a_folder_of_somebody_else_is_named(tmp_path):
    (tmp_path / "prune").symlink_to("/sys/kernel")  # where root cannot make a file either
    file = tmp_path / "prune" / "stage.json"
    message = told(tmp_path, lambda: file.write_text("a"))
    assert message.startswith(f"--output_dir: {file} cannot be written (")
    assert message.endswith("; have it be yours, or set another --output_dir")


@pytest.mark.parametrize("place", ["/sys/kernel/a", "missing/a"])
def test_other_faults_keep_their_traceback(place, tmp_path):
    with pytest.raises(OSError, match=place), disk_faults_named(tmp_path):
        (tmp_path / place).write_text("a")
