"""One config under rows of changed keys x sparsities x seeds, each a run of its own.

    python launch/grid.py --config configs/grid/refinement.yaml --output_dir runs/refinement

A cell is one run of `launch/train.py` with the keys of its row. Under `--output_dir` are

    runs/      the run folder of each cell, and logs/ what it printed
    cells/     a small JSON file for each cell that is done
    table.md   accuracy and KL of all cells, and the headline row against each other one
    grid.json  all cells in the form of a sweep, from which `launch/results.py` makes tables

A cell that is done is kept as long as its command is the same; after a change of the code or of the
config file under it, set another folder. One that was cut off goes on where it was, and `--known`
takes cells from the `grid.json` of another machine. `OMP_NUM_THREADS` sets the threads of each run.

`recovered` of a cell is the student at the end of its run and `pruned` the one-shot student. Its
sparsity is what it has fewer weights than the teacher, all of them counted, over the teacher's
prunable ones: for a sparse student its fraction of zeros, and a smaller dense one has a place too.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import ConfigDict

from launch.typed_yaml import read_typed
from pipeline.artifacts import RunFolder, git_commit, hash_json, write_json, write_text
from pipeline.config import Config
from pipeline.config_loading import load_config
from pipeline.config_yaml import YamlError, parse_yaml
from pipeline.errors import UserError
from pipeline.evaluation.markdown import escape
from pipeline.evaluation.sweep_comparison_tables import against_table
from pipeline.evaluation.sweep_grid import RECOVERED_ACCURACY, RECOVERED_KL, SweepGrid
from pipeline.evaluation.sweep_tables import row_table
from pipeline.stages.paths import check_paths

ROOT = Path(__file__).resolve().parents[1]
BAD_INPUT = 2
REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run. Values are as on the command line; `{level}` in one stands for the sparsity."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    title: str
    config: Path
    """Of every run, relative to the repository."""
    keys: dict[str, Any]
    """SECTION.KEY to value, of every run."""
    levels: dict[float, dict[str, Any]]
    """Values of `prune.sparsity`, each with further keys that it sets."""
    seeds: list[int]
    """Values of `run.seed`."""
    headline: str
    """Row that the others are compared with."""
    rows: dict[str, dict[str, Any]]
    """Label to the keys that make the row; they win over all others."""


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """One run: where it stands in the grid, its folders, and what the command line adds."""

    row: str
    level: float
    seed: int
    root: Path
    arguments: list[str]

    @property
    def name(self) -> str:
        """A file name that no other cell of the grid has."""
        return f"{hash_json(self.row)[:8]}-{self.level:g}-{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder; another one for another command."""
        return self.root / "runs" / f"{self.name}-{hash_json(self.arguments)[:8]}"

    @property
    def result(self) -> Path:
        """The cell's file."""
        return self.root / "cells" / f"{self.name}.json"


def plan(grid: Grid, root: Path) -> list[CellPlan]:
    """All cells, seeds outermost, so that an early end leaves whole comparisons."""
    return [
        CellPlan(
            row=row, level=level, seed=seed, root=root, arguments=_arguments(grid, row, level, seed)
        )
        for seed in grid.seeds
        for level in grid.levels
        for row in grid.rows
    ]


def _arguments(grid: Grid, row: str, level: float, seed: int) -> list[str]:
    values = {"run.seed": seed, "prune.sparsity": level}
    values |= grid.keys | grid.levels[level] | grid.rows[row]
    words = [
        word
        for key, value in values.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    return [word.replace("{level}", f"{level:g}") for word in words]


def check(grid: Grid, cells: list[CellPlan], check_config: Callable[[Config], None]) -> None:
    """Reads the config of every cell, so that a fault shows before the first of many runs.

    Args:
        grid: What is run.
        cells: Its cells.
        check_config: Looks at each config too; relative paths are those of the repository.

    Raises:
        UserError: A config is at fault; names its cell.
    """
    for cell in cells:
        told = zip(cell.arguments[::2], cell.arguments[1::2], strict=True)
        try:
            overrides = {word.removeprefix("--"): parse_yaml(value)[0] for word, value in told}
            with chdir(ROOT):
                check_config(load_config(grid.config, overrides))
        except (UserError, YamlError) as error:
            raise UserError(f"{cell.row} at {cell.level:g}, seed {cell.seed}: {error}") from error


def is_measured(cell: CellPlan) -> bool:
    """Whether the cell's file is there, from the same command."""
    path = cell.result
    return path.exists() and json.loads(path.read_text())["command"] == cell.arguments


def take_known(cells: list[CellPlan], known: Path) -> None:
    """Writes the files of cells that stand in a `grid.json`, where the command is the same.

    Raises:
        UserError: There is no such file.
    """
    if not known.exists():
        raise UserError(f"--known: {known}: no such file; set a grid.json, or leave it out")
    found = {tuple(cell["command"]): cell for cell in json.loads(known.read_text())["cells"]}
    for cell in cells:
        if tuple(cell.arguments) in found and not is_measured(cell):
            write_json(cell.result, found[tuple(cell.arguments)])


def run_cell(grid: Grid, cell: CellPlan) -> None:
    """Runs a cell, up to its report.

    Raises:
        UserError: The run failed; its own message stands in its log.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(grid.config)]
    log = cell.root / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            [*command, "--output_dir", str(cell.folder.resolve()), *cell.arguments],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise UserError(f"{cell.row} at {cell.level:g}, seed {cell.seed}: failed; see {log}")


def measure(cell: CellPlan) -> dict[str, Any]:
    """The cell's file, from the report of its run."""
    report = json.loads((cell.folder / REPORT_FILE).read_text())
    return {
        "row": cell.row,
        "prune": {},
        "sparsity": cell.level,
        "seed": cell.seed,
        "measured_sparsity": _sparsity(RunFolder.open(cell.folder)),
        "pruned": _model(report, "pruned"),
        "recovered": _model(report, "student"),
        "timing": report["timing"],
        "git_commit": git_commit(),
        "command": cell.arguments,
    }


def _model(report: dict[str, Any], name: str) -> dict[str, float | None]:
    sections = {"accuracy": "accuracy", "kl": "kl_to_teacher", "perplexity": "perplexity"}
    found = {key: report.get(section, {}).get(name) for key, section in sections.items()}
    return {key: value for key, value in found.items() if value is not None or key == "kl"}


def _sparsity(folder: RunFolder) -> float:
    """(weights of the teacher - non-zero weights of the student) / prunable ones of the teacher.

    Weights outside the prunable ones count whatever they are.
    """
    from transformers.utils.logging import disable_progress_bar  # it and torch take seconds

    from pipeline.models.loading import load_model
    from pipeline.models.prunable import prunable_weights
    from pipeline.stages.inputs import stage_before

    disable_progress_bar()
    last = folder.stage(stage_before(folder, "evaluate")) / "model"
    student = load_model(str(last))
    teacher = load_model(load_config(folder.root / "config.yaml", {}).teacher.path)
    all_weights = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(student).values())
    prunable = sum(weight.numel() for weight in prunable_weights(teacher).values())
    return (all_weights[0] - (all_weights[1] - zeros)) / prunable


def _summary(measured: dict[str, Any]) -> str:
    found = measured["recovered"]
    return (
        f"{measured['row']} at {measured['sparsity']:g}, seed {measured['seed']}: accuracy "
        f"{found['accuracy']:.4f}, KL {found['kl']:.4f}, sparsity "
        f"{measured['measured_sparsity']:.4f}, {sum(measured['timing'].values()):.0f} s"
    )


def collect(grid: Grid, cells: list[CellPlan], output: Path) -> None:
    """Writes the cells that are measured, rows in order, as `grid.json` and `table.md`."""
    order = {row: place for place, row in enumerate(grid.rows)}
    found = [json.loads(cell.result.read_text()) for cell in cells if is_measured(cell)]
    found.sort(key=lambda cell: (order[cell["row"]], cell["sparsity"], cell["seed"]))
    description = {"title": grid.title, "headline_row": grid.headline, "config": str(grid.config)}
    write_json(output / "grid.json", {"description": description, "reference": {}, "cells": found})
    if found:
        write_text(output / "table.md", _page(grid, SweepGrid(found, {}, grid.headline)))


def _page(grid: Grid, found: SweepGrid) -> str:
    """The cells as tables, rows down and levels across."""
    sections = [
        f"# {escape(grid.title)}",
        "## Accuracy of the student",
        *row_table(found, RECOVERED_ACCURACY, found.rows),
        "## KL to the teacher, nats per token",
        *row_table(found, RECOVERED_KL, found.rows),
    ]
    if found.cells(grid.headline) and len(found.rows) > 1:
        sections += [
            f"## Accuracy of {escape(grid.headline)} less that of each other row, paired by seed",
            against_table(found, RECOVERED_ACCURACY, found.rows, found.levels),
        ]
    return "\n\n".join(sections) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs a grid. Returns the exit status: 2 when the user has something to mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a file of configs/grid/")
    parser.add_argument("--output_dir", type=Path, required=True, help="of runs, cells and logs")
    parser.add_argument("--known", type=Path, help="a grid.json whose cells need not be run again")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args(argv)
    try:
        grid = read_typed(arguments.config, Grid, "rows, levels and seeds")
        cells = plan(grid, arguments.output_dir)
        (arguments.output_dir / "cells").mkdir(parents=True, exist_ok=True)
        if arguments.known is not None:
            take_known(cells, arguments.known)
        waiting = [cell for cell in cells if not is_measured(cell)]
        check(grid, waiting, check_paths)
        collect(grid, cells, arguments.output_dir)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            runs = pool.map(lambda cell: run_cell(grid, cell), waiting)
            for cell, _ in zip(waiting, runs, strict=True):
                measured = measure(cell)
                write_json(cell.result, measured)
                print(_summary(measured), flush=True)
                collect(grid, cells, arguments.output_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
