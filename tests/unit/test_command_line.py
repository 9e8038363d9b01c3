"""`launch/train.py`: what the command line means, what it prints, and its exit status."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from launch import train
from pipeline.config import Config
from pipeline.config_keys import describe_keys
from pipeline.config_loading import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train.py"


def run_script(*arguments, cwd, env=None):
    """Runs the script as a user does, from a folder that is not the repository."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("prune: {sparsity: 0.5}\ndistill: {max_steps: 2}\ngrpo: {max_steps: 3}\n")
    return path


@pytest.fixture
def calls(monkeypatch):
    """Puts a pipeline in place that only notes how it is called."""
    noted = []
    module = types.ModuleType("pipeline.run")
    module.run = lambda config, **options: noted.append((config, options))
    monkeypatch.setitem(sys.modules, "pipeline.run", module)
    return noted


def message(capsys, *arguments):
    """The message of a command line that must fail with status 2."""
    assert train.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


# What reaches the pipeline.


def test_config_overrides_and_options_reach_the_pipeline(config_file, calls):
    status = train.main(
        [
            "--config",
            str(config_file),
            "--prune.sparsity=0.7",
            "--grpo.learning_rate",
            "1e-3",
            "--grpo.top_k",
            "-1",
            "--rewards.functions",
            "[correctness, my.module:fn]",
            "--stages",
            "prune, grpo",
            "--resume",
            "redo",
            "--output_dir",
            "elsewhere/run.1",
        ]
    )
    assert status == 0
    ((config, options),) = calls
    assert config == load_config(
        config_file,
        {
            "prune.sparsity": 0.7,
            "grpo.learning_rate": 0.001,
            "grpo.top_k": -1,
            "rewards.functions": ["correctness", "my.module:fn"],
            "run.stages": ["prune", "grpo"],
        },
    )
    assert options == {"output_dir": Path("elsewhere/run.1"), "resume": "redo"}


def test_the_run_folder_is_named_after_the_config(config_file, calls):
    assert train.main(["--config", str(config_file)]) == 0
    assert calls[0][1] == {"output_dir": Path("runs/tiny"), "resume": "auto"}


def test_evaluate_works_without_a_config_file(calls):
    assert train.main(["--stages", "evaluate", "--student.path", "some/model"]) == 0
    ((config, options),) = calls
    assert config.run.stages == ["evaluate"]
    assert config.student.path == "some/model"
    assert options["output_dir"] == Path("runs/evaluate")


def test_resume_takes_a_checkpoint_folder(config_file, calls, tmp_path):
    assert train.main(["--config", str(config_file), "--resume", str(tmp_path)]) == 0
    assert calls[0][1]["resume"] == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("", ""), ("'a: b'", "a: b"), ("two words", "two words"), ("~/x", "~/x"), ("'7'", "7")],
)
def test_text_values(text, value):
    _, overrides = train.parse_command_line([f"--task.instruction={text}"])
    assert overrides == {"task.instruction": value}


# Messages.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--confg", "x"], "--confg: unknown option; use --config instead"),
        (["--outputdir=x"], "--outputdir: unknown option; use --output_dir instead"),
        (["--sparsity", "0.5"], "--sparsity: unknown option; use --prune.sparsity instead"),
        (["--prune", "3"], "--prune: unknown option; use --prune.KEY instead"),
        (
            ["--stages=evaluate", "--export.formats=hf"],
            "export.formats: hf: must be a valid list; set [hf] instead",
        ),
        (["--resume="], "--resume: : neither a checkpoint folder nor one of"),
        (["-config", "x"], "-config: unknown option; use --config instead"),
        (["prune"], "prune: belongs to no option"),
        (["--prune.sparsity"], "--prune.sparsity: no value given; write --prune.sparsity=VALUE"),
        (["--prune.sparsity", "--print_config"], "--prune.sparsity: no value given"),
        (["--prune.sparsity=[1"], "--prune.sparsity: [1: not YAML"),
        (["--grpo.generation_kwargs={a: 1, a: 2}"], "a: given twice"),
        (
            ["--stages", "evaluate", "--prune.sparcity=1"],
            "prune.sparcity: 1: unknown key; set prune.sparsity instead",
        ),
        (["--stages", "grpo"], "--config: not given: only stage evaluate works without"),
        ([], "--config: not given"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "absent.yaml"], "--config: absent.yaml: no such file"),
        (["--resume", "atuo"], "--resume: atuo: neither a checkpoint folder nor one of"),
        (["--resume", "runs/none/checkpoint-5"], "--resume: runs/none/checkpoint-5: neither"),
        (["--output_dir="], "argument --output_dir: the name is empty"),
        (["--print_confi"], "use --print_config instead"),
    ],
)
def test_bad_command_lines(capsys, calls, arguments, said):
    assert said in message(capsys, *arguments)
    assert not calls


def test_all_faults_of_file_and_command_line_come_together(capsys, calls, config_file):
    config_file.write_text("prune: {sparsity: 2}\n")
    text = message(capsys, "--config", str(config_file), "--grpo.seed", "1", "--rum.seed", "1")
    assert f"3 faults in --config {config_file} and the command line" in text
    for key in ("prune.sparsity: 2:", "grpo.seed: 1:", "rum: {seed: 1}: unknown key; set run"):
        assert key in text


@pytest.mark.parametrize("stages", ["prun,evaluate", ""])
def test_a_misspelt_stage(capsys, calls, config_file, stages):
    text = message(capsys, "--config", str(config_file), "--stages", stages)
    assert f"run.stages[0]: {stages[:4] or repr(stages)}: must be 'prune', 'distill', " in text


def test_one_rank_speaks_for_all(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--confg"]) == 2
    assert capsys.readouterr().err == ""


# The real process.


def test_help_mentions_every_key_and_where_trl_documents_its_own(tmp_path):
    done = run_script("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for entry in describe_keys():
        assert f"--{entry.key} (" in done.stdout
    for section in Config.model_fields:
        assert f"\n{section}: " in done.stdout
    for option in train.OPTIONS:
        assert option in done.stdout
    assert "pydoc trl.GRPOConfig" in done.stdout
    assert "pydoc trl.SFTConfig" in done.stdout
    assert "pydoc trl.DistillationConfig" in done.stdout


def test_print_config_is_a_config_with_every_key(tmp_path, config_file):
    done = run_script("--config", str(config_file), "--print_config", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "printed.yaml", {}) == load_config(config_file, {})
    assert len(list(tmp_path.iterdir())) == 2  # nothing else was written


def test_bad_input_ends_with_status_2_and_no_traceback(tmp_path):
    done = run_script("--config", "absent.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --config: absent.yaml: no such file; give a YAML file instead\n"


def test_an_error_of_ours_ends_with_status_1_and_its_traceback(tmp_path):
    (tmp_path / "run.py").write_text("def run(*args, **kwargs):\n    raise RuntimeError('ours')\n")
    code = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('pipeline.run', {str(tmp_path / 'run.py')!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "sys.modules['pipeline.run'] = module\n"
        "import runpy\n"
        f"sys.argv = ['train.py', '--stages', 'evaluate']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: ours" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--print_config", "--stages=evaluate"],
        ["--stages=evaluate", "--grpo.max_step=3"],
    ],
)
def test_nothing_heavy_is_imported_before_the_config_is_good(tmp_path, arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'trl', 'transformers', 'accelerate', 'deepspeed', 'numpy'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
