"""Checkpoints: only whole ones count, and nothing that goes wrong while saving harms older ones."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.stages.training import train
from pipeline.training.checkpoint import (
    check_whole,
    later_checkpoints,
    new_checkpoint,
    newest_whole_checkpoint,
)
from pipeline.training.manifest import MANIFEST_FILE
from pipeline.training.step_agreement import StepAgreement
from tests.unit.test_training import distill_trainer, sparsity_of, tokenizer  # noqa: F401

CONTENT = bytes(range(256)) * 40
ROOT = Path(__file__).parents[2]


def save(stage, *steps, limit=None):
    for step in steps:
        with new_checkpoint(stage, step, limit) as folder:
            (folder / "weights").write_bytes(CONTENT)
            (folder / "part").mkdir()
            (folder / "part" / "moments").write_bytes(CONTENT[:100])


def interrupted_save(stage, step):
    with new_checkpoint(stage, step, 2) as folder:
        (folder / "weights").write_bytes(CONTENT)
        raise KeyboardInterrupt


def names(stage):
    return sorted(path.name for path in stage.iterdir())


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "weights has 10239 bytes"),
    "missing": (Path.unlink, "weights is missing"),
    "bit-flipped": (flip_a_bit, "weights is not what was written"),
    "zero-length": (lambda path: path.write_bytes(b""), "weights has 0 bytes, not 10240"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_checkpoint_is_named_left_in_place_and_passed_over(kind, tmp_path, caplog):
    damage, reason = DAMAGE[kind]
    save(tmp_path, 9, 10)
    damage(tmp_path / "checkpoint-10" / "weights")
    with caplog.at_level(logging.WARNING):
        assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    (message,) = caplog.messages
    assert f"{tmp_path}/checkpoint-10 is not whole ({reason}" in message
    assert "left in place" in message
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    with pytest.raises(UserError, match=r"--resume: .*checkpoint-10 is not whole .*--resume auto"):
        check_whole(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"a": 1}}', '{"files": {"a": {}}}'])
def test_a_damaged_manifest_is_a_broken_checkpoint(text, tmp_path, caplog):
    save(tmp_path, 9, 10)
    (tmp_path / "checkpoint-10" / MANIFEST_FILE).write_text(text)
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "manifest.json is damaged" in caplog.text


def test_a_checkpoint_from_before_manifests_is_passed_over_and_the_log_says_so(tmp_path, caplog):
    save(tmp_path, 5)
    (tmp_path / "checkpoint-5" / MANIFEST_FILE).unlink()
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_whole_checkpoint(tmp_path) is None
    assert "saved by an older version" in caplog.messages[0]
    assert "has no whole checkpoint; the stage begins anew" in caplog.messages[1]


def test_an_interrupted_save_harms_nothing_and_leaves_nothing_behind_the_next(tmp_path):
    save(tmp_path, 1, limit=2)
    with pytest.raises(KeyboardInterrupt):
        interrupted_save(tmp_path, 2)
    assert names(tmp_path) == ["_saving", "checkpoint-1"]
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    save(tmp_path, 2, limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_rotation_counts_whole_ones_and_leaves_broken_and_later_ones(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 9)
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"")
    save(tmp_path, 5, limit=2)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (2, 3, 4, 5, 9)]
    assert later_checkpoints(tmp_path / "checkpoint-4") == [
        tmp_path / "checkpoint-9",
        tmp_path / "checkpoint-5",
    ]


def test_a_step_that_is_saved_again_replaces_the_broken_one(tmp_path):
    save(tmp_path, 1, 2)
    flip_a_bit(tmp_path / "checkpoint-2" / "weights")
    save(tmp_path, 2, limit=2)
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_the_manifest_lists_every_file(tmp_path):
    save(tmp_path, 1)
    files = json.loads((tmp_path / "checkpoint-1" / MANIFEST_FILE).read_text())["files"]
    assert list(files) == ["part/moments", "weights"]
    assert files["part/moments"]["bytes"] == 100


def test_trainers_rotate_after_the_new_one_is_whole_and_save_by_the_clock(tokenizer, tmp_path):  # noqa: F811
    trainer = distill_trainer(tokenizer, tmp_path / "out", 5)
    trainer.args.save_total_limit = 2
    trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune"))
    trainer.add_callback(StepAgreement(save_minutes=1e-9))
    saved, put = [], trainer._save_checkpoint

    def spy(*args):
        put(*args)
        saved.append([name for name in names(tmp_path / "out") if name != "README.md"])

    trainer._save_checkpoint = spy
    trainer.train()
    pairs = [["checkpoint-1"], *([f"checkpoint-{i}", f"checkpoint-{i + 1}"] for i in range(1, 5))]
    assert saved == pairs
    assert newest_whole_checkpoint(tmp_path / "out").name == "checkpoint-5"


def test_an_earlier_checkpoint_that_is_asked_for_ends_as_the_straight_run(tokenizer, tmp_path):  # noqa: F811
    """Those after it would be gone on from at the next start: they are set aside."""
    out, ends = tmp_path / "run" / "distill", []
    for checkpoint in (None, out / "checkpoint-2"):
        trainer = distill_trainer(tokenizer, out, 5)
        trainer.args.save_steps = 2
        sparsity = sparsity_of(trainer.model, tmp_path / "prune")
        train(Config(), None, trainer, sparsity, out, checkpoint)
        ends.append(trainer.model.state_dict())
    assert [step["step"] for step in sparsity.refinements] == [1, 2, 3, 4]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    aside = sorted(path.name for path in (tmp_path / "run" / "old").glob("*/distill/*"))
    assert aside == ["checkpoint-4", "checkpoint-5"]


FILL = """
import sys
from pathlib import Path
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.training.checkpoint import newest_whole_checkpoint
from tests.unit.test_training import distill_trainer, sparsity_of

disk, tokenizer = Path(sys.argv[1]), load_tokenizer("bundled")


def fill(path):
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(b"0" * size) == size:
                    pass
            except OSError:
                pass


for kind in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
    trainer = distill_trainer(tokenizer, disk / kind, 50)
    trainer.args.save_steps = 1
    trainer.add_sparsity(sparsity_of(trainer.model, disk / "prune"))
    put = getattr(trainer, kind)

    def nearly_full(*args, **kwargs):
        if trainer.state.global_step == 2:
            fill(disk / "filler")
        return put(*args, **kwargs)

    setattr(trainer, kind, nearly_full)
    try:
        trainer.train()
    except UserError as error:
        left = sorted(path.name for path in (disk / kind).iterdir())
        print("FOUND", newest_whole_checkpoint(disk / kind).name, left, error)
    (disk / "filler").unlink()
"""


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    """On a real file system of its own, with each part of a checkpoint the one without space."""
    script = f"mount -t tmpfs -o size=64m none {tmp_path} && exec {sys.executable} - {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces (sysctl kernel.unprivileged_userns_clone=1)")
    done = subprocess.run(
        [*command, "sh", "-c", script],
        input=FILL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 3, done.stdout
    for line in found:
        assert line.startswith("FOUND checkpoint-1 ['README.md', 'checkpoint-1'] --output_dir: ")
        assert "no space left for checkpoint-2" in line
        assert "make room and run the same command again" in line
