"""The door to the pipeline: reads the command line and the config, then runs the stages.

    accelerate launch launch/train.py --config configs/quickstart.yaml --prune.sparsity 0.7

Exit status: 0 done; 2 bad input, with one message and no traceback; 75 stopped by a signal after
saving, the same command goes on; 1 anything else. Neither torch nor trl is imported before the
config is known to be good, so `--help` and mistakes show at once.
"""

import argparse
import difflib
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NoReturn

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config
from pipeline.config_keys import describe_keys, nearest_keys
from pipeline.config_loading import load_config, to_yaml
from pipeline.config_yaml import YamlError, parse_yaml
from pipeline.errors import UserError
from pipeline.stages.paths import check_paths
from pipeline.stopping import STATUS, Stopped, listening

OPTIONS = (
    "--config",
    "--output_dir",
    "--stages",
    "--resume",
    "--check",
    "--print_config",
    "--help",
)
RESUME_WORDS = ("auto", "redo", "never")
SECONDS_FOR_RANK_0 = 20
TRL_HELP = """\
distill, on_policy and grpo take TRL's own keys too, with TRL's names and meanings, for example
--grpo.max_steps 500. To list them: python -m pydoc trl.SFTConfig (for distill),
python -m pydoc trl.DistillationConfig (for on_policy), python -m pydoc trl.GRPOConfig (for grpo),
or https://huggingface.co/docs/trl"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are a `UserError`, and whose manual lists every config key."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"command line: {message}; --help shows how it is used")

    def format_help(self) -> str:
        """Writes the options, then each key with type, default and meaning."""
        return f"{super().format_help()}\n{_config_manual()}\n{TRL_HELP}\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the pipeline as the command line says.

    Args:
        argv: Arguments without the program's name; None reads the process's own.

    Returns:
        The exit status: 0, 2 when the user has something to mend, or 75 when a signal stopped it.
    """
    try:
        with listening():
            _run(sys.argv[1:] if argv is None else argv)
    except Stopped:
        return STATUS
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # set by the launcher: one rank speaks for all
            print(f"error: {error}", file=sys.stderr)
        else:  # the launcher ends every rank as soon as one has left
            time.sleep(SECONDS_FOR_RANK_0)
        return 2
    return 0


def _run(argv: list[str]) -> None:
    """Parses, checks, and hands over to the stages."""
    options, overrides = parse_command_line(argv)
    if options.config is None and overrides.get("run.stages") != ["evaluate"]:
        raise UserError(
            "--config: not given: only stage evaluate works without; give --config FILE, or "
            "--stages evaluate to measure a model"
        )
    config = load_config(options.config, overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return

    check_paths(config)
    stem = "evaluate" if options.config is None else Path(options.config).stem
    output_dir = options.output_dir or Path("runs") / stem
    if options.check:
        from pipeline.doctor.check import check  # here, because it imports torch and trl

        check(config, output_dir=output_dir, resume=options.resume)
        return

    from pipeline.run import run  # for the same reason

    run(config, output_dir=output_dir, resume=options.resume)


def parse_command_line(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Splits the command line into options and config overrides.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The options `config`, `output_dir`, `resume`, `check`, `print_config`, and dotted key to
        value parsed as YAML, `--stages a,b` among them as `run.stages`.

    Raises:
        UserError: An option is unknown, lacks its value, or has one that is not YAML.
    """
    plain, overrides = _take_overrides(argv)
    options, rest = _build_parser().parse_known_args(plain)
    if rest:
        raise UserError(_unknown_argument(rest))
    if options.stages is not None:
        overrides["run.stages"] = [name.strip() for name in options.stages.split(",")]
    if options.resume not in RESUME_WORDS and not (
        options.resume and Path(options.resume).is_dir()
    ):
        near = difflib.get_close_matches(options.resume, RESUME_WORDS, n=1) or RESUME_WORDS
        raise UserError(
            f"--resume: {options.resume}: neither a checkpoint folder nor one of "
            f"{', '.join(RESUME_WORDS)}; give {near[0]} instead"
        )
    return options, overrides


def _take_overrides(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--SECTION.KEY VALUE` and `--SECTION.KEY=VALUE` out of the arguments."""
    plain: list[str] = []
    overrides: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        option, equals, text = argument.partition("=")
        if not option.startswith("--") or "." not in option:
            plain.append(argument)
            continue
        if not equals:
            text = next(arguments, "--")
            if text.startswith("--"):
                raise UserError(f"{option}: no value given; write {option}=VALUE")
        try:
            value, duplicates = parse_yaml(text)
        except YamlError as error:
            raise UserError(f"{option}: {text}: not YAML ({error}); put it in quotes") from None
        if duplicates:
            raise UserError(f"{option}: {text}: {duplicates[0]}")
        overrides[option[2:]] = value if text else ""
    return plain, overrides


def _build_parser() -> _Parser:
    """The options that are not config keys."""
    parser = _Parser(
        prog="train.py",
        usage="train.py --config FILE [options] [--SECTION.KEY VALUE ...]",
        description="Prunes a Llama and trains it to answer like its teacher.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file; not needed for --stages evaluate"
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", type=_folder, help="run folder (default runs/<FILE's stem>)"
    )
    parser.add_argument("--stages", metavar="A,B", help="stages to run: short for --run.stages")
    parser.add_argument(
        "--resume",
        metavar="HOW",
        default="auto",
        help="auto (default): go on where the run folder stands; redo: move stages whose config "
        "changed to old/ and run them again; never: refuse a folder with results; or the path of "
        "a checkpoint folder",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="load config, task, tokenizers and model shapes, estimate memory and disk, say what "
        "is wrong, and stop; no weights are read and nothing is written",
    )
    parser.add_argument("--print_config", action="store_true", help="print every key and stop")
    return parser


def _folder(text: str) -> Path:
    """A path that is not empty, because that would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _unknown_argument(rest: list[str]) -> str:
    """Says what is wrong with arguments that no option takes."""
    option = next((text.partition("=")[0] for text in rest if text.startswith("-")), None)
    if option is None:
        return f"{rest[0]}: belongs to no option; every value follows a --KEY"
    name = option.lstrip("-")
    near = difflib.get_close_matches(f"--{name}", OPTIONS, n=1)
    near = near or [
        f"--{key}.KEY" if key in Config.model_fields else f"--{key}" for key in nearest_keys(name)
    ]
    remedy = f"use {' or '.join(near)} instead" if near else "--help lists the options"
    return f"{option}: unknown option; {remedy}"


def _config_manual() -> str:
    """One entry per config key under the heading of its section."""
    width = min(shutil.get_terminal_size().columns, 100)
    lines = []
    keys = describe_keys()
    for section, field in Config.model_fields.items():
        lines += ["", f"{section}: {(field.annotation.__doc__ or '').strip()}"]
        for key, kind, default, docstring in keys:
            if key.startswith(f"{section}."):
                text = f"--{key} ({kind}; default {default}): {docstring}"
                lines += textwrap.wrap(
                    text,
                    width,
                    initial_indent="  ",
                    subsequent_indent=" " * 6,
                    break_on_hyphens=False,
                )
    return "config keys, as sections of the YAML file or as options:\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
