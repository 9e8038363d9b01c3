"""Every shipped config, spoilt in many ways: status 2, one message with the key, all left alone."""

import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from launch.train import main
from pipeline.config_loading import load_config
from tests.unit.bad_configs import FILES, PER_FILE, Shipped, bad_mutations, good_mutations

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_run(monkeypatch):
    """A pipeline that must not be reached."""
    module = types.ModuleType("pipeline.run")
    module.run = lambda *arguments, **options: pytest.fail("a bad config was run")
    monkeypatch.setitem(sys.modules, "pipeline.run", module)


def run_folder(tmp_path):
    """A run folder with something in it, and what that is."""
    out = tmp_path / "run"
    (out / "prune").mkdir(parents=True)
    (out / "prune" / "stage.json").write_text('{"done": false}')
    (out / "exit_status").write_text("75\n")
    return out, snapshot(out)


def snapshot(folder):
    """Names, contents and times of all files of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def written(mutation, tmp_path):
    """The path that `--config` is given."""
    (tmp_path / "config.yaml").write_bytes(mutation.content)
    return str(tmp_path / mutation.file_name)


@pytest.mark.parametrize("kind", PER_FILE)
def test_a_bad_config_is_one_message(kind, capsys, tmp_path, no_run):
    out, before = run_folder(tmp_path)
    refused = Counter()
    for index, path in enumerate(FILES):
        for mutation in bad_mutations(kind, Shipped.read(path), index):
            what = f"{path.name}: {kind}: {mutation.name}"
            given = ["--config", written(mutation, tmp_path), "--output_dir", str(out)]
            assert main(given) == 2, what
            captured = capsys.readouterr()
            assert captured.out == "", what
            assert captured.err.startswith("error: "), what
            assert captured.err.count("error: ") == 1, what
            assert "Traceback" not in captured.err, what
            assert mutation.says in captured.err, (what, captured.err)
            refused[path.name] += 1
    assert refused == {path.name: PER_FILE[kind] for path in FILES}
    assert snapshot(out) == before


def test_there_are_enough():
    assert len(FILES) * sum(PER_FILE.values()) >= 200


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_that_is_only_written_otherwise_passes(path, tmp_path):
    wanted, names = load_config(path, {}), []
    for mutation in good_mutations(Shipped.read(path)):
        assert load_config(written(mutation, tmp_path), {}) == wanted, mutation.name
        names.append(mutation.name)
    assert len(names) == 5


@pytest.mark.parametrize("kind", PER_FILE)
def test_a_bad_config_in_a_process_of_its_own(kind, tmp_path):
    out, before = run_folder(tmp_path)
    mutation = next(bad_mutations(kind, Shipped.read(FILES[-1]), len(FILES) - 1))
    given = ["--config", written(mutation, tmp_path), "--output_dir", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert mutation.says in done.stderr
    assert snapshot(out) == before
    assert not (tmp_path / "runs").exists()
