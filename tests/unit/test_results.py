"""RESULTS.md shows what results/ holds, and a figure changed by hand is found."""

import json
from pathlib import Path

import pytest

from launch import results

ROOT = Path(__file__).parents[2]
MARKER = "<!-- table: {} -->\nstale figure\n<!-- /table -->\n"


def cell(row: str, level: float, seed: int, kl: float) -> dict:
    """A cell of a sweep with a KL and a perplexity."""
    return {
        "row": row,
        "prune": {"method": row, "redistribution": "none", "scope": None},
        "sparsity": level,
        "seed": seed,
        "measured_sparsity": level,
        "prune_seconds": 1.0,
        "pruned": {"kl": kl, "perplexity": 1 + kl},
        "recovered": None,
    }


@pytest.fixture
def folder(tmp_path):
    """A folder of results with one sweep and one prune suite."""
    kls = {("ours", 0.5): (1.0, 3.0), ("theirs", 0.5): (2.0, 6.0), ("ours", 0.9): (9.0, 9.0)}
    cells = [cell(*place, seed, kl) for place, pair in kls.items() for seed, kl in enumerate(pair)]
    sweep = {
        "description": {"headline_row": "ours"},
        "reference": {"dense": {}, "unigram_perplexity": 8.0},
        "cells": cells,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    side = {"seconds": {"median": 2.0}, "ratio": {"median": 1.5}, "peak_bytes": 3 * 2**20}
    layers = {"1B": {"calibration": {"forward": side}, "sparsities": {"0.7": {"wanda": side}}}}
    (tmp_path / "suite.json").write_text(json.dumps({"layers": layers}))
    spread = {"median": 2.0, "quartiles": [1.5, 3.0]}
    step = {
        "suite": "step",
        "seconds": {"TRL": spread, "ours": spread},
        "parts": {"teacher": spread},
        "ratio_to_trl": {"ours": {"median": 1.04, "quartiles": [1.0, 1.1]}},
    }
    (tmp_path / "step.json").write_text(json.dumps(step))
    return tmp_path


def test_the_page_is_what_results_hold():
    page = (ROOT / "RESULTS.md").read_text()
    assert results.MARKED.search(page)
    assert results.render(page, ROOT / "results") == page


def test_the_page_names_every_file_of_results():
    page = (ROOT / "RESULTS.md").read_text()
    assert not [path.name for path in (ROOT / "results").iterdir() if path.stem not in page]


def test_means_spreads_and_broken_cells(folder):
    page = results.render(MARKER.format("{file: sweep, measure: kl}"), folder)
    assert "| method | 0.50 | 0.90 |" in page
    assert "| ours | **2.00 ± 1.41** | 9.00 ± 0.00 † |" in page
    assert "| theirs | 4.00 ± 2.83 |" in page
    assert "stale" not in page


def test_rows_and_levels_are_chosen(folder):
    marker = MARKER.format("{file: sweep, measure: kl, rows: [theirs], levels: [0.5]}")
    page = results.render(marker, folder)
    assert "| theirs | 4.00 ± 2.83 |" in page
    assert "ours" not in page


def test_headline_against_rows(folder):
    page = results.render(MARKER.format("{file: sweep, against: kl}"), folder)
    assert "| against | 0.50 |" in page
    assert "0.5 (+2.00 ± 1.00)" in page


def test_measures_side_by_side(folder):
    page = results.render(
        MARKER.format("{file: sweep, level: 0.5, measures: [kl, perplexity]}"), folder
    )
    assert "| method | kl | perplexity |" in page
    assert "| ours | **2.00 ± 1.41** | **3.00 ± 1.41** |" in page


def test_layer_of_the_prune_suite(folder):
    page = results.render(MARKER.format("{file: suite, layer: 1B}"), folder)
    assert "| forward | 2 (1.5), 3 |  |" in page
    assert "| wanda |  | 2 (1.5), 3 |" in page


def test_exports_of_the_inference_suite(folder):
    speed = {"median": 20.5, "quartiles": [19.0, 22.0]}
    ratio = {"median": 2.25, "quartiles": [2.0, 2.5]}
    rows = [
        {"export": name, "sparsity": share, "dtype": "float32", "bytes": 3_100_000}
        | {"largest_logit_difference": 2e-6, "largest_logit": 1.5} | timed
        for name, share, timed in (
            ("packed", 0.9, {}),
            ("narrow", 0.4, {"decode_8": {"tokens_per_second": speed, "ratio": ratio}}),
        )
    ]  # fmt: skip
    models = {"125M": {"batch_sizes": [8], "prefill_tokens": 128, "exports": rows}}
    break_even = {"1": {"float32": {"0.5": {"median": 0.98}, "0.9": {"median": 4.125}}}}
    (folder / "inference.json").write_text(json.dumps({"models": models, "break_even": break_even}))
    page = results.render(MARKER.format("{file: inference, model: 125M}"), folder)
    assert "| decode, batch 8 | prompt of 128 | logits differ by |" in page
    assert "| packed | 90 % | float32 | 3.1 |  |  | 2.0e-06 of 1.5 |" in page
    assert "| narrow | 40 % of MLP | float32 | 3.1 | 20.5 [19, 22]<br>x 2.25 [2.00, 2.50] |" in page
    page = results.render(MARKER.format("{file: inference, break_even: float32}"), folder)
    assert "| batch | 0.5 | 0.9 |" in page
    assert "| 1 | 0.98 | 4.12 |" in page


def test_row_that_is_not_there(folder):
    with pytest.raises(KeyError, match="no row nobody's"):
        results.render(MARKER.format('{file: sweep, measure: kl, rows: ["nobody\'s"]}'), folder)


def test_changed_figure_is_shown(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").symlink_to(folder, target_is_directory=True)
    (tmp_path / "RESULTS.md").write_text(MARKER.format("{file: sweep, measure: kl}"))
    assert results.main([]) == 1
    assert "-stale figure" in capsys.readouterr().out
    assert results.main(["--write"]) == 0
    assert results.main([]) == 0


def test_step_suite(folder):
    page = results.render(MARKER.format("{file: step, step: 125M}"), folder)
    assert "| TRL | 2.000 (1.500 to 3.000) |  |" in page
    assert "| ours | 2.000 (1.500 to 3.000) | 1.040 (1.000 to 1.100) |" in page
    assert "| teacher | 2.000 (1.500 to 3.000) |  |" in page


def test_quality_suite(folder):
    def spread(median):
        return {"median": median, "quartiles": [median / 2, 2 * median]}

    own = {"kl": spread(0.5), "perplexity": spread(2.0), "accuracy": spread(0.25)}
    rows = [
        {"method": "MAMA", "sparsity": 0.9, "is_broken": False, **own},
        {"method": "a|b", "sparsity": 0.9, "is_broken": True, **own, "kl_ratio": spread(0.125)},
    ]
    found = {"headline": "MAMA", "unigram_perplexity": 38.07, "rows": rows}
    (folder / "quality.json").write_text(json.dumps(found))
    page = results.render(MARKER.format("{file: quality, quality: all}"), folder)
    assert "| sparsity | KL | perplexity | accuracy | KL of MAMA / its KL |" in page
    figures = "0.9 | 0.5 (0.25 to 1) | 2 (1 to 4) | 25.0 % (12.5 % to 50.0 %)"
    assert f"| MAMA | {figures} |  |" in page
    assert "whose perplexity is 38.1; shown" in page
    assert f"| a\\|b † | {figures} | 0.125 (0.062 to 0.250) |" in page
