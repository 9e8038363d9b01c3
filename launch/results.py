"""Tables of RESULTS.md from what was measured: one command shows the same figures again.

    python launch/results.py            fails where the page and results/ differ, and shows how
    python launch/results.py --write    puts the tables of results/ into the page

A table stands between two markers. The first says what to show, as YAML on one line:

    <!-- table: {file: sweep_text, measure: kl, levels: [0.5, 0.7], rows: [MAMA, SparseGPT]} -->
    <!-- /table -->

`file` is one of results/. A sweep has `measure` (kl, accuracy, perplexity, text_perplexity,
recovered_kl or recovered_accuracy), or `against`, one of them, of the headline row beside each
other row's; or at one `level` several `measures` side by side. `rows` and `levels` are optional.
The prune suite has `layer`, inference `model`, or `break_even`, a dtype of the dense
side, the step suite `step`, its shape, the quality suite `quality: all`, the soak `faults: all`.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from pipeline.evaluation.formats import number, percent
from pipeline.evaluation.markdown import escape, table
from pipeline.evaluation.sweep_cell_text import BROKEN, cell_text, marks
from pipeline.evaluation.sweep_comparison_tables import against_table
from pipeline.evaluation.sweep_grid import (
    ACCURACY,
    KL,
    PERPLEXITY,
    RECOVERED_ACCURACY,
    RECOVERED_KL,
    TEXT_PERPLEXITY,
    SweepGrid,
)
from pipeline.evaluation.sweep_tables import row_table

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\{.*?\}) -->\n).*?(<!-- /table -->)", re.DOTALL)
MEASURES = {
    "kl": KL,
    "accuracy": ACCURACY,
    "perplexity": PERPLEXITY,
    "text_perplexity": TEXT_PERPLEXITY,
    "recovered_kl": RECOVERED_KL,
    "recovered_accuracy": RECOVERED_ACCURACY,
}


def render(page: str, results: Path) -> str:
    """The page with every table made anew.

    Args:
        page: The text of RESULTS.md.
        results: The folder of the JSON files.

    Raises:
        KeyError: A marker names a row, layer or measure that its file does not have.
        FileNotFoundError: A marker names a file that is not there.
    """

    def fill(match: re.Match) -> str:
        wanted = yaml.safe_load(match[2])
        found = json.loads((results / f"{wanted['file']}.json").read_text())
        show = next((SUITE_TABLES[key] for key in wanted if key in SUITE_TABLES), sweep_table)
        return f"{match[1]}\n{show(found, wanted)}\n\n{match[3]}"

    return MARKED.sub(fill, page)


def sweep_table(found: dict, wanted: dict) -> str:
    """Rows of a sweep down, levels across."""
    grid = SweepGrid(found["cells"], found["reference"], found["description"]["headline_row"])
    rows = wanted.get("rows", grid.rows)
    levels = wanted.get("levels", grid.levels)
    missing = [row for row in rows if row not in grid.rows]
    if missing:
        raise KeyError(f"{wanted['file']}.json has no row {', '.join(missing)}")
    if "measures" in wanted:
        return _side_by_side(grid, wanted["measures"], rows, wanted["level"])
    if "against" in wanted:
        return against_table(grid, MEASURES[wanted["against"]], rows, levels)
    return "\n\n".join(row_table(grid, MEASURES[wanted["measure"]], rows, levels))


def _side_by_side(grid: SweepGrid, names: list[str], rows: list[str], level: float) -> str:
    """Rows down, several measures at one level across."""
    measures = [MEASURES[name] for name in names]
    best = [grid.best_rows(measure, level, rows) for measure in measures]
    pairs = list(zip(measures, best, strict=True))
    header = ["method", *(name.replace("_", " ") for name in names)]
    body = [
        [
            escape(row),
            *(cell_text(grid, measure, row, level, row in wins) for measure, wins in pairs),
        ]
        for row in rows
    ]
    return "\n\n".join(
        [table([header, *body]), *marks(grid, measures[0], rows, [level], any(best))]
    )


def layer_table(found: dict, wanted: dict) -> str:
    """Calibration and methods of one layer of the prune suite down; sparsities across."""
    layer = found["layers"][wanted["layer"]]
    columns = {"calibration": layer["calibration"], **layer["sparsities"]}
    sides = dict.fromkeys(side for figures in columns.values() for side in figures)
    header = ["seconds (ratio), peak MiB", *columns]
    body = [[side, *(_side(figures.get(side)) for figures in columns.values())] for side in sides]
    return table([header, *body])


def fault_table(found: dict, wanted: dict) -> str:
    """Kinds of faults down: how often each was tried, and what became of the runs."""
    kinds: dict[str, list[dict]] = {}
    for fault in found["faults"].values():
        ranks = fault["ranks"]
        kinds.setdefault(f"{fault['kind']}, {ranks} rank{'s' * (ranks > 1)}", []).append(fault)
    header = ["fault", "times tried", "lost", "ended bit-identical"]
    body = [
        [kind, str(len(tried)), *(str(sum(f[key] for f in tried)) for key in ("lost", "identical"))]
        for kind, tried in kinds.items()
    ]
    return table([header, *body])


def _side(figures: dict | None) -> str:
    if figures is None:
        return ""
    seconds, ratio = figures["seconds"]["median"], figures["ratio"]["median"]
    peak = figures["peak_bytes"]
    memory = "" if peak is None else f", {peak / 2**20:,.0f}"
    return f"{number(seconds)} ({number(ratio)}){memory}"


def inference_table(found: dict, wanted: dict) -> str:
    """Exports of one model of the inference suite down; bytes, speeds and logits across."""
    model = found["models"][wanted["model"]]
    speeds = {f"decode_{size}": f"decode, batch {size}" for size in model["batch_sizes"]}
    speeds["prefill"] = f"prompt of {model['prefill_tokens']}"
    header = ["export", "zeros", "dtype", "MB", *speeds.values(), "logits differ by"]
    body = [
        [
            row["export"],
            f"{100 * row['sparsity']:.0f} %" + (" of MLP" if row["export"] == "narrow" else ""),
            row["dtype"],
            f"{row['bytes'] / 1e6:.1f}",
            *(_speed(row.get(key)) for key in speeds),
            f"{row['largest_logit_difference']:.1e} of {row['largest_logit']:.1f}",
        ]
        for row in model["exports"]
    ]
    return table([header, *body])


def _speed(figures: dict | None) -> str:
    """Tokens a second [quartiles], ratio to the dense model [quartiles]."""
    if figures is None:
        return ""
    speed, ratio = figures["tokens_per_second"], figures["ratio"]
    low, high = (number(value) for value in speed["quartiles"])
    least, most = ratio["quartiles"]
    return (
        f"{number(speed['median'])} [{low}, {high}]<br>"
        f"x {ratio['median']:.2f} [{least:.2f}, {most:.2f}]"
    )


def break_even_table(found: dict, wanted: dict) -> str:
    """Batch sizes down, sparsities across: how many times as fast CSR is as the dense product."""
    batches = {size: by[wanted["break_even"]] for size, by in found["break_even"].items()}
    sparsities = next(iter(batches.values()))
    body = [
        [size, *(f"{ratio['median']:.2f}" for ratio in by.values())] for size, by in batches.items()
    ]
    return table([["batch", *sparsities], *body])


def step_table(found: dict, wanted: dict) -> str:
    """A GRPO step of each side of the step suite, and what it consists of."""
    body = []
    for name, figures in (found["seconds"] | found["parts"]).items():
        ratio = found["ratio_to_trl"].get(name)
        body.append([name, _spread(figures), "" if ratio is None else _spread(ratio)])
    return table([["median (quartiles)", "seconds", "of TRL's step"], *body])


def quality_table(found: dict, wanted: dict) -> str:
    """Methods of the quality suite at each sparsity down; what they leave of the model across."""
    ratio = f"KL of {escape(found['headline'])} / its KL"
    header = ["median (quartiles)", "sparsity", "KL", "perplexity", "accuracy", ratio]
    body = []
    for row in found["rows"]:
        cells = [_interval(row[key], number) for key in ("kl", "perplexity")]
        cells.append(_interval(row["accuracy"], percent))
        cells.append(_spread(row["kl_ratio"]) if "kl_ratio" in row else "")
        mark = f" {BROKEN}" if row["is_broken"] else ""
        body.append([escape(row["method"]) + mark, f"{row['sparsity']:g}", *cells])
    note = (
        f"{BROKEN} worse than a unigram model, whose perplexity is "
        f"{number(found['unigram_perplexity'])}; shown, but no claim is made of it."
    )
    return f"{table([header, *body])}\n\n{note}"


def _interval(figures: dict, show: Callable[[float], str]) -> str:
    lower, upper = figures["quartiles"]
    return f"{show(figures['median'])} ({show(lower)} to {show(upper)})"


def _spread(figures: dict) -> str:
    lower, upper = figures["quartiles"]
    return f"{figures['median']:.3f} ({lower:.3f} to {upper:.3f})"


SUITE_TABLES = {
    "layer": layer_table,
    "model": inference_table,
    "break_even": break_even_table,
    "step": step_table,
    "quality": quality_table,
    "faults": fault_table,
}
"""Key of a marker to what it shows; a marker without one shows a sweep."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where page and results agree, or were made to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="change RESULTS.md")
    arguments = parser.parse_args(argv)
    path = ROOT / "RESULTS.md"
    page = path.read_text()
    made = render(page, ROOT / "results")
    if arguments.write:
        path.write_text(made)
        return 0
    lines = difflib.unified_diff(
        page.splitlines(), made.splitlines(), "RESULTS.md", "results/", lineterm="", n=0
    )
    differences = list(lines)
    print("\n".join(differences) or "RESULTS.md shows what results/ holds")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
