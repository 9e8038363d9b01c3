"""A grid of whole runs: which cells there are, what each is told, and how they are put together."""

import json
from pathlib import Path

import pytest

from launch.grid import Grid, check, collect, is_measured, main, plan, take_known
from launch.typed_yaml import read_typed

ROOT = Path(__file__).parents[2]
GRID = Grid(
    title="t",
    config=Path("c.yaml"),
    keys={"run.stages": ["prune"], "distill.max_steps": 5},
    levels={0.5: {}, 0.95: {"refine.every_steps": 7}},
    seeds=[3, 1],
    headline="b",
    rows={"b": {}, "a": {"prune.sparsity": 0, "distill.max_steps": 9, "student.path": "d/{level}"}},
)


def test_seeds_are_outermost_and_a_row_wins_over_everything(tmp_path):
    cells = plan(GRID, tmp_path)
    assert [(cell.seed, cell.level, cell.row) for cell in cells] == [
        (seed, level, row) for seed in (3, 1) for level in (0.5, 0.95) for row in ("b", "a")
    ]
    words = cells[3].arguments
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert told == {
        "--run.seed": "3",
        "--prune.sparsity": "0",
        "--run.stages": '["prune"]',
        "--refine.every_steps": "7",
        "--distill.max_steps": "9",
        "--student.path": "d/0.95",
    }


def test_every_cell_has_its_own_files_and_another_command_another_run_folder(tmp_path):
    cells = plan(GRID, tmp_path)
    assert len({cell.result for cell in cells}) == len({cell.folder for cell in cells}) == 8
    changed = plan(Grid(**vars(GRID) | {"keys": {"distill.max_steps": 6}}), tmp_path)
    assert changed[0].result == cells[0].result
    assert changed[0].folder != cells[0].folder


def test_cells_are_collected_in_the_order_of_the_rows(tmp_path):
    cells = plan(GRID, tmp_path)
    for cell in cells[1:]:
        cell.result.parent.mkdir(exist_ok=True)
        values = {"row": cell.row, "sparsity": cell.level, "seed": cell.seed}
        values |= {"command": cell.arguments, "prune": {}, "measured_sparsity": cell.level}
        values["recovered"] = {"accuracy": 0.25 if cell.row == "a" else 0.75, "kl": 1.0}
        cell.result.write_text(json.dumps(values))
    collect(GRID, cells, tmp_path)
    found = json.loads((tmp_path / "grid.json").read_text())
    assert found["description"]["headline_row"] == "b"
    assert [(c["row"], c["sparsity"], c["seed"]) for c in found["cells"]] == [
        ("b", 0.5, 1), ("b", 0.95, 1), ("b", 0.95, 3),
        ("a", 0.5, 1), ("a", 0.5, 3), ("a", 0.95, 1), ("a", 0.95, 3),
    ]  # fmt: skip
    accuracy, kl, against = (tmp_path / "table.md").read_text().split("\n## ")[1:]
    assert "| b | **75.0 %** (1 seed) | **75.0 ± 0.0 %** |" in accuracy
    assert "| a | 1.00 ± 0.00 | 1.00 ± 0.00 |" in kl
    assert "| a | +50.0 %<br>1 seed | +50.0 ± 0.0 % |" in against


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/grid").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_shipped_grid_is_whole(path, tmp_path):
    grid = read_typed(path, Grid, "rows")
    assert (ROOT / grid.config).exists()
    assert grid.headline in grid.rows
    check(grid, plan(grid, tmp_path), lambda config: None)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("rewards.sparsity_weight: 1.0", "rewards.sparsity_weight: 1.0: "),
        ("student.path: runs/not/there", "student.path: 'runs/not/there'"),
    ],
)
def test_a_fault_in_any_cell_shows_before_the_first_run(tmp_path, capsys, value, fault):
    rows = f"{{fine: {{}}, wrong: {{{value}}}}}"
    path = tmp_path / "grid.yaml"
    path.write_text(
        "title: t\nconfig: configs/quickstart.yaml\nkeys: {}\nlevels: {0.9: {}}\nseeds: [1]\n"
        f"headline: fine\nrows: {rows}\n"
    )
    assert main(["--config", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: wrong at 0.9, seed 1: ")
    assert fault in message
    assert not (tmp_path / "out" / "runs").exists()


def test_known_cells_are_taken_where_the_command_is_the_same(tmp_path):
    cells = plan(GRID, tmp_path)
    cells[0].result.parent.mkdir()
    cell = {"row": "b", "sparsity": 0.5, "seed": 3}
    known = [
        cell | {"command": cells[0].arguments},
        cell | {"command": [*cells[1].arguments, "--a", "1"]},
    ]
    (tmp_path / "known.json").write_text(json.dumps({"cells": known}))
    take_known(cells, tmp_path / "known.json")
    assert [is_measured(cell) for cell in cells] == [True] + [False] * 7
