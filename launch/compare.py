"""Puts runs beside each other: what came out, what it cost, which config keys differ.

    python launch/compare.py runs/quickstart runs/quickstart_95 [--html compare.html]

Runs that are unfinished or failed are shown with what they have. The difference between two
students has an interval, paired over the prompts where both answered the same ones. The page shows
what training logged too, the runs' curves over each other.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.artifacts import STAGES, RunFolder, write_text
from pipeline.config_yaml import YamlError, parse_yaml
from pipeline.errors import UserError
from pipeline.evaluation.page import render_page
from pipeline.evaluation.run_comparison import Run, render_comparison, text_comparison
from pipeline.evaluation.run_curves import plot_runs
from pipeline.evaluation.summary import Report
from pipeline.stages.training_logs import training_logs

BAD_INPUT = 2


def read_run(root: Path, name: str) -> Run:
    """What a run folder holds.

    Raises:
        UserError: It is no run folder, or a file in it is broken.
    """
    folder = RunFolder(root)
    try:
        values, _ = parse_yaml((root / "config.yaml").read_text(encoding="utf-8"))
        records = {stage: record for stage in STAGES if (record := folder.record(stage))}
        report = _json(root / "report.json") or {}
        measured = _json(folder.stage("evaluate") / "metrics.json") or {}
        return Run(
            name=name,
            config={f"{s}.{key}": v for s, keys in values.items() for key, v in keys.items()},
            report=report if records.get("evaluate", {}).get("done") else _so_far(records),
            stages={stage: record["done"] for stage, record in records.items()},
            correct=(measured.get("student", {}).get("accuracy") or {}).get("correct"),
            logs=training_logs(folder),
        )
    except (OSError, ValueError, YamlError, AttributeError, KeyError) as error:
        raise UserError(
            f"RUN: {root}: not a run folder that can be read ({error}); give the --output_dir of "
            "a run of launch/train.py"
        ) from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _so_far(records: Mapping[str, Mapping[str, Any]]) -> Report:
    """What the stages of a run that was not evaluated have written down, as in its report."""
    last = next(reversed(records.values()), {})
    known = {key: last[key] for key in ("seed", "git_commit", "config_hash") if key in last}
    seconds = {stage: found["seconds"] for stage, found in records.items() if "seconds" in found}
    return known | ({"timing": seconds} if seconds else {})


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def main(argv: list[str] | None = None) -> int:
    """Compares runs. Returns the exit status: 2 when the user has something to mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the page here too")
    arguments = parser.parse_args(argv)
    try:
        if len(arguments.runs) < 2:
            raise UserError("RUN: only one was given; a comparison needs two or more")
        names = names_of(arguments.runs)
        runs = [read_run(root, name) for root, name in zip(arguments.runs, names, strict=True)]
        print(text_comparison(runs))
        if arguments.html is not None:
            pictures = plot_runs({run.name: run.logs for run in runs})
            page = render_page(render_comparison(runs, pictures), pictures)
            write_text(arguments.html, page)
            print(f"\n{arguments.html}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
