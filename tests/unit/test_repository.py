"""The repository itself: shipped configs, package data, no paths of one machine, honest skips."""

import fnmatch
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pipeline.config_loading import load_config

ROOT = Path(__file__).parents[2]

NUM_CONFIGS = {
    "configs": 8,
    "configs/accelerate": 7,
    "configs/benchmark": 5,
    "configs/grid": 4,
}

MACHINE_PATH = re.compile(r"(?<![\w.~}*<-])/(?:home|root|Users|work|opt|tmp|scratch|public)/\w")


def shipped_configs(folder: str) -> list[Path]:
    """The YAML files of one folder."""
    return sorted((ROOT / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", shipped_configs("configs"), ids=lambda path: path.stem)
def test_shipped_config_loads(path):
    assert load_config(path, {}).run.stages


@pytest.mark.parametrize("path", shipped_configs("configs/accelerate"), ids=lambda path: path.stem)
def test_accelerate_accepts_topology(path):
    topology = load_config_from_file(str(path))
    stage = re.search(r"zero(\d)", path.stem)
    assert topology.use_cpu == path.stem.startswith("cpu")
    assert topology.deepspeed_config.get("zero_stage") == (int(stage[1]) if stage else None)
    assert topology.num_processes == {"cpu": 2, "gpu": 8, "nod": 16}.get(path.stem[:3], 1)


def test_every_config_is_looked_at():
    assert {folder: len(shipped_configs(folder)) for folder in NUM_CONFIGS} == NUM_CONFIGS
    assert len(list((ROOT / "configs").rglob("*.y*ml"))) == sum(NUM_CONFIGS.values())


def uncommented_keys(text: str) -> list[str]:
    """Keys that hold a value, with a comment neither behind it nor on the line above."""
    lines, found = text.splitlines(), []

    def visit(mapping: yaml.MappingNode) -> None:
        for key, value in mapping.value:
            if isinstance(value, yaml.MappingNode):
                visit(value)
                continue
            line, end = key.start_mark.line, value.end_mark
            behind = re.search(r"\s#\s*\w", lines[end.line][end.column :])
            above = line > 0 and re.match(r"\s*#\s*\w", lines[line - 1])
            if not behind and not above:
                found.append(key.value)

    visit(yaml.compose(text))
    return found


@pytest.mark.parametrize(
    "path",
    [path for folder in NUM_CONFIGS for path in shipped_configs(folder)],
    ids=lambda path: path.stem,
)
def test_every_key_has_a_comment(path):
    assert uncommented_keys(path.read_text()) == []


def test_key_without_comment_is_found():
    text = "a:\n  b: '2 # 3'\n  # four\n  c: 5\n  d: [6]  # six\n  e: 7  #\nf: {g: 8}\n"
    assert uncommented_keys(text) == ["b", "e", "g"]


def repository_texts() -> dict[str, str]:
    """Name to content of every text file that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            if b"\0" not in content:
                texts[name] = content.decode()
    return texts


def test_no_file_names_a_path_of_one_machine():
    texts = repository_texts()
    assert [name for name, text in texts.items() if MACHINE_PATH.search(text)] == []
    assert {"README.md", "configs/grpo_70.yaml", ".ci/run"} <= texts.keys()


@pytest.mark.parametrize("folder", ["home", "root", "Users", "work", "opt", "tmp"])
def test_machine_path_is_found(folder):
    assert MACHINE_PATH.search(f"path: '/{folder}/someone'")
    assert not MACHINE_PATH.search(f"path: data/{folder}/someone")


def test_bundled_model_is_installed():
    bundled = importlib.resources.files("pipeline.models") / "bundled"
    sizes = {path.name: path.stat().st_size for path in Path(str(bundled)).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sizes.keys()
    assert sizes["model.safetensors"] <= 6e6
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["pipeline.models"]
    shipped = [n for n in sizes if any(fnmatch.fnmatch(f"bundled/{n}", p) for p in patterns)]
    assert sorted(shipped) == sorted(sizes)


def test_every_folder_with_code_is_a_package():
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]
    folders = {path.parent for path in files}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_readme_maps_every_file():
    _, _, behind = (ROOT / "README.md").read_text().partition("## File map")
    mapped = re.findall(r"^    ((?:launch|pipeline|rewards)/\S+\.py)", behind, re.MULTILINE)
    folders = [ROOT / name for name in ("launch", "pipeline", "rewards")]
    files = [str(p.relative_to(ROOT)) for folder in folders for p in folder.rglob("*.py")]
    assert sorted(mapped) == sorted(name for name in files if not name.endswith("__init__.py"))


SKIPPING_TESTS = """
import pytest

def test_passes(): pass

def test_skips(): pytest.skip("no such thing here")

@pytest.mark.xfail
def test_fails_as_expected(): raise AssertionError

@pytest.mark.gpu
def test_gpu(): pytest.skip("needs a CUDA device")
"""


def test_require_all_turns_skips_into_failures(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_tests.py").write_text(SKIPPING_TESTS)
    (tmp_path / "test_file.py").write_text("import pytest\npytest.importorskip('no_such_module')")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--continue-on-collection-errors"],
        cwd=tmp_path,
        env=os.environ | {"REQUIRE_ALL": "1"},
        capture_output=True,
        text=True,
    )
    assert "2 failed, 1 passed, 1 skipped, 1 error" in done.stdout.splitlines()[-1], done.stdout
    assert "REQUIRE_ALL=1 allows no skip: Skipped: no such thing here" in done.stdout


def test_a_test_cannot_reach_the_network():
    import urllib.request

    with pytest.raises(OSError, match="tried to reach"):
        urllib.request.urlopen("http://192.0.2.1/", timeout=5)  # TEST-NET-1, RFC 5737
