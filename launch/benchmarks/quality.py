"""The quality suite: what one-shot methods leave of a model, ours against its rivals.

A sweep of the pipeline (`pipeline/stages/sweep.py`) prunes the model by every row in turn, at every
level, on several draws of calibration rows, and measures each student on the same prompts. Shown
are medians and quartiles over the draws, and, paired by draw,

    ratio  KL to the dense model of the headline row / KL of the row

where less than 1 speaks for the headline row, but for students worse than a unigram model, of which
no claim is made. Nothing is trained.
"""

import json
import math
import tempfile
from pathlib import Path

from launch.benchmarks.timing import ratios, summary
from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.evaluation.sweep_cell_text import BROKEN
from pipeline.evaluation.sweep_grid import ACCURACY, KL, PERPLEXITY, SweepGrid
from pipeline.run import run as run_stages

MEASURES = (KL, PERPLEXITY, ACCURACY)


def run(config_path: Path) -> dict:
    """Runs the sweep in a folder of its own and sums it up.

    Args:
        config_path: A config whose one stage is `sweep`.

    Raises:
        UserError: The config is at fault, or a student is so broken that a figure is not finite.
    """
    config = load_config(config_path, {})
    if config.run.stages != ["sweep"]:
        raise UserError(f"run.stages: {config.run.stages}: the suite is a sweep; set [sweep]")
    if len(config.sweep.seeds) < 2:
        raise UserError(f"sweep.seeds: {config.sweep.seeds}: a spread needs draws; set two or more")
    with tempfile.TemporaryDirectory() as folder:
        run_stages(config, output_dir=Path(folder) / "quality")
        found = json.loads((Path(folder) / "quality" / "sweep" / "sweep.json").read_text())
    description = found["description"]
    grid = SweepGrid(found["cells"], found["reference"], description["headline_row"])
    return {
        "model": description["model"],
        "calibration": description["calibration"],
        "seeds": grid.seeds,
        "headline": grid.headline_row,
        "dense": found["reference"]["dense"],
        "unigram_perplexity": found["reference"]["unigram_perplexity"],
        "num_prompts": found["reference"]["num_prompts"],
        "methods": grid.settings,
        "rows": [
            _row(grid, row, level)
            for level in grid.levels
            for row in grid.rows
            if grid.cells(row, level)
        ],
    }


def _row(grid: SweepGrid, row: str, level: float) -> dict:
    """One method at one level: every figure, and its KL ratio where it is a rival."""
    values = {m: list(grid.values(m, row, level).values()) for m in MEASURES}
    if not all(math.isfinite(value) for found in values.values() for value in found):
        raise UserError(
            f"sweep.levels: {level:g}: {row} leaves a model without a finite perplexity or KL; set "
            "lower levels"
        )
    figures = {m.key: summary(found) | {"by_seed": found} for m, found in values.items()}
    own = list(grid.values(KL, grid.headline_row, level).values())
    if row != grid.headline_row and own:
        figures["kl_ratio"] = ratios(own, values[KL])
    broken = grid.is_broken(KL, row, level)
    return {"method": row, "sparsity": level, "is_broken": broken, **figures}


def show(result: dict) -> None:
    """Prints one line for each method and level."""
    dense = result["dense"]
    print(
        f"{result['model']}; dense: accuracy {dense['accuracy']:.3f}, perplexity "
        f"{dense['perplexity']:.3g}; medians over {len(result['seeds'])} draws"
    )
    ratio = f"KL of {result['headline']} / its KL"
    print(f"{'sparsity':>8}  {'method':12}{'KL':>10}{'perplexity':>12}{'accuracy':>10}  {ratio}")
    for row in result["rows"]:
        kl, perplexity, accuracy = (row[measure.key]["median"] for measure in MEASURES)
        line = f"{row['sparsity']:8g}  {row['method']:12}"
        line += f"{kl:10.4g}{perplexity:12.4g}{accuracy:10.3f}"
        if "kl_ratio" in row:
            low, high = row["kl_ratio"]["quartiles"]
            line += f"  {row['kl_ratio']['median']:.3f} ({low:.3f} to {high:.3f})"
        print(f"{line}  {BROKEN if row['is_broken'] else ''}".rstrip())
    print(f"{BROKEN} worse than a unigram model's perplexity, {result['unigram_perplexity']:.3g}")
