"""A sweep's page and pictures: numbers by hand, honest marks, no claim that the cells lack."""

import math
import re
import struct

import pytest
from matplotlib.colors import to_hex

from pipeline.evaluation.figures import BLUE, GREY
from pipeline.evaluation.sweep_cell_text import level_text, with_error
from pipeline.evaluation.sweep_comparison import Verdict, compare, peer
from pipeline.evaluation.sweep_drawing import draw_levels, row_points
from pipeline.evaluation.sweep_grid import ACCURACY, KL, RECOVERED_ACCURACY, SweepGrid
from pipeline.evaluation.sweep_plots import PICTURES, picture_title
from pipeline.evaluation.sweep_tables import render_page, write_sweep_report

OURS, RIVAL = "MAMA + LS", "magnitude + LS"
SETTINGS = {
    OURS: ("mama", "least_squares", None),
    RIVAL: ("magnitude", "least_squares", None),
    "MAMA": ("mama", "none", None),
    "magnitude": ("magnitude", "none", None),
    "magnitude, model-wide": ("magnitude", "none", "model"),
    "-weights": ("negative_magnitude", "none", None),
    "random": ("random", "none", None),
    "Wanda": ("wanda", "none", None),
    "SDMPrune-style": ("sdmprune", "none", None),
    "MAMA + LS 2:4": ("mama", "least_squares", "2:4"),
    "MAMA 2:4": ("mama", "none", "2:4"),
    "Wanda 2:4": ("wanda", "none", "2:4"),
    "Wanda 4:8": ("wanda", "none", "4:8"),
    "odd_$name|": ("other", "none", None),
}
DESCRIPTION = {
    "title": "One-shot pruning of a model",
    "command": "python launch/train.py --config sweep.yaml",
    "headline_row": OURS,
    "model": "bundled",
    "prunable_weights": 331776,
}


def reference(unigram=37.2, text_unigram=None):
    numbers = {"accuracy": 0.999, "kl": 0.0, "top1": 1.0, "perplexity": 1.04}
    return {
        "dense": numbers | {"text_perplexity": 21.5 if text_unigram else None},
        "unigram_perplexity": unigram,
        "unigram_text_perplexity": text_unigram,
        "num_prompts": 2000,
        "num_tokens": 12000,
        "perplexity_on": "words",
    }


def numbers(kl=0.5, perplexity=2.0, accuracy=0.25, text=None):
    return {
        "accuracy": accuracy,
        "kl": kl,
        "top1": 0.5,
        "perplexity": perplexity,
        "text_perplexity": text,
    }


def cell(row, sparsity, seed, *, measured=None, seconds=3.0, recovered=None, **pruned):
    method, redistribution, scope = SETTINGS[row]
    return {
        "row": row,
        "prune": {
            "method": method,
            "redistribution": redistribution,
            "scope": scope,
            "sparsity": sparsity,
        },
        "sparsity": sparsity,
        "seed": seed,
        "measured_sparsity": sparsity + 1e-4 if measured is None else measured,
        "prune_seconds": seconds,
        "pruned": numbers(**pruned),
        "recovered": recovered,
    }


def cells_of(row, sparsity, *kls, **more):
    """Seeds 1, 2, 3, ... with one KL each."""
    return [cell(row, sparsity, seed, kl=kl, **more) for seed, kl in enumerate(kls, 1)]


def recovered_cells(row, sparsity, *accuracies, steps=300):
    return [
        cell(
            row, sparsity, i, recovered={**numbers(accuracy=a), "steps": steps, "seconds": 40.0 + i}
        )
        for i, a in enumerate(accuracies, 1)
    ]


def grid_of(*groups, unigram=37.2):
    return SweepGrid([c for group in groups for c in group], reference(unigram), OURS)


def page_of(*groups, unigram=37.2, text_unigram=None):
    """The page without its pictures, which take longer."""
    cells = [c for group in groups for c in group]
    return render_page(SweepGrid(cells, reference(unigram, text_unigram), OURS), DESCRIPTION, {})


def tables_in(page, heading):
    """Each table below a heading: first column to the other cells, the header included."""
    section = re.split(r"\n#+ ", page.partition(f" {heading}\n")[2])[0]
    found = re.findall(r"(?:^\|.*\|$\n?)+", section, re.MULTILINE)
    rows = [[re.split(r" (?<!\\)\| ", line[2:-2]) for line in t.splitlines()] for t in found]
    assert all(len({len(row) for row in table}) <= 2 for table in rows)
    return [{row[0]: row[1:] for row in table if not row[0].startswith("---")} for table in rows]


def test_means_spreads_and_the_best_by_hand():
    page = page_of(
        cells_of(RIVAL, 0.7, 0.4, 0.4, 0.7),  # mean 0.5, squares 0.01 0.01 0.04: sd sqrt(0.03)
        cells_of(OURS, 0.7, 0.1, 0.2, 0.3),  # mean 0.2, sd 0.1
        cells_of(OURS, 0.5, 0.00918, 0.00918, 0.00918),
        cells_of(RIVAL, 0.5, 0.008, 0.009, 0.010),
    )
    (table,) = tables_in(page, "KL to the dense model")
    assert list(table) == ["method", RIVAL, OURS], "rows as given"
    assert table["method"] == ["0.50", "0.70"], "levels ascending"
    assert table[RIVAL] == ["**0.00900 ± 0.00100**", "0.500 ± 0.173"]
    assert table[OURS] == ["0.00918 ± 0.00000", "**0.200 ± 0.100**"]
    assert "Mean ± standard deviation over 3 seeds." in page
    assert "- Bold: the best of its level.\n" in page + "\n"
    assert "†" not in page.partition("## Perplexity")[0]


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.217, 0.00931, "0.217 ± 0.009"),
        (5.4432, 0.1184, "5.44 ± 0.12"),
        (51841.1, 812.0, "51,841 ± 812"),
        (0.0001, 0.05, "0.0001 ± 0.0500"),
        (4.567e-5, 3.1e-6, "4.57e-05 ± 3e-06"),
        (0.0, 0.0, "0.00 ± 0.00"),
    ],
)
def test_errors_are_rounded_like_their_mean(mean, error, text):
    assert with_error(KL, mean, error) == text


def test_levels_have_two_decimals_or_more():
    assert [level_text(level) for level in (0.0, 0.5, 0.99, 0.985)] == [
        "0.00",
        "0.50",
        "0.99",
        "0.985",
    ]


def test_rows_that_are_equal_have_no_best():
    page = page_of(cells_of(RIVAL, 0.9, 0.5, 0.5), cells_of(OURS, 0.9, 0.5, 0.5))
    assert "**" not in page
    page = page_of(cells_of(OURS, 0.9, 0.5, 0.5))
    assert "**" not in page


def test_ratio_difference_and_error_by_hand():
    # Ratios 1/2, 1/2, 1; differences 0.1, 0.2, 0: mean 0.1, sd 0.1.
    grid = grid_of(cells_of(OURS, 0.7, 0.1, 0.2, 0.4), cells_of(RIVAL, 0.7, 0.2, 0.4, 0.4))
    found = compare(grid, KL, RIVAL, 0.7)
    assert found.ratio == pytest.approx(0.25 ** (1 / 3))
    assert found.difference == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.num_seeds == 3
    assert compare(grid, KL, OURS, 0.7) is None
    assert compare(grid, KL, RIVAL, 0.5) is None


@pytest.mark.parametrize(
    ("advantages", "verdict"),
    [
        ((0.10, 0.12, 0.11), Verdict.WINS),
        ((-0.10, -0.12, -0.11), Verdict.LOSES),
        ((0.1, 0.1, 0.1, 0.1, -0.001), Verdict.UNDECIDED),  # mean four errors, one seed against
        ((-0.1, -0.1, -0.1, -0.1, 0.001), Verdict.UNDECIDED),
        ((0.01, 0.01, 0.40), Verdict.UNDECIDED),  # mean 0.14, error 0.13
        ((-0.01, -0.01, -0.40), Verdict.UNDECIDED),
        ((0.0, 0.0, 0.0), Verdict.UNDECIDED),
        ((0.2, 0.3), Verdict.NO_CLAIM),  # mean 0.25, error 0.05, but two seeds
        ((0.3,), Verdict.NO_CLAIM),
    ],
)
def test_verdict(advantages, verdict):
    theirs = [1.0 + advantage for advantage in advantages]
    ours = [1.0 for _ in advantages]
    grid = grid_of(cells_of(OURS, 0.7, *ours), cells_of(RIVAL, 0.7, *theirs))
    assert compare(grid, KL, RIVAL, 0.7).verdict is verdict


def test_only_shared_seeds_are_paired():
    theirs = [cell(RIVAL, 0.7, seed, kl=kl) for seed, kl in ((7, 9.9), (3, 0.8), (1, 0.5))]
    grid = grid_of(cells_of(OURS, 0.7, 0.1, 99.0, 0.2), theirs)
    found = compare(grid, KL, RIVAL, 0.7)
    assert found.num_seeds == 2
    assert found.difference == pytest.approx(((0.5 - 0.1) + (0.8 - 0.2)) / 2)


def test_for_accuracy_more_is_better():
    ours = [cell(OURS, 0.7, seed, accuracy=a) for seed, a in enumerate((0.9, 0.8, 0.7), 1)]
    theirs = [cell(RIVAL, 0.7, seed, accuracy=a) for seed, a in enumerate((0.5, 0.3, 0.25), 1)]
    found = compare(grid_of(ours, theirs), ACCURACY, RIVAL, 0.7)
    assert found.verdict is Verdict.WINS
    assert found.difference == pytest.approx(0.45)


def test_comparison_as_a_reader_sees_it():
    page = page_of(
        cells_of(OURS, 0.5, 1.0, 1.0, 1.0),
        cells_of(OURS, 0.7, 1.0, 1.0, 1.0),
        cells_of(OURS, 0.9, 1.0, 1.0, 1.0),
        cells_of(RIVAL, 0.5, 2.0, 2.0, 2.0),
        cells_of(RIVAL, 0.7, 0.5, 0.5, 0.5),
        cells_of(RIVAL, 0.9, 0.9, 1.1, 1.0),
        cells_of("random", 0.9, 5.0, 5.0, 5.0, perplexity=40.0),
    )
    (table,) = tables_in(page, f"{OURS} against each row")
    assert table["against"] == ["0.50", "0.70", "0.90"]
    assert table[RIVAL] == [
        "**wins**<br>0.5 (+1.00 ± 0.00)",
        "**loses**<br>2 (-0.500 ± 0.000)",
        "undecided<br>1 (+0.0000 ± 0.0577)",
    ]
    assert table["random"] == ["-", "-", "no claim †<br>0.2 (+4.00 ± 0.00)"]
    assert (
        f"Of 4 comparisons {OURS} wins 1 and loses 1; 1 are undecided, and of 1 no claim is made."
        in page
    )


def test_broken_is_a_matter_of_the_mean_perplexity():
    high, low = ((1, 30.0), (2, 50.0), (3, 40.0)), ((1, 20.0), (2, 50.0), (3, 35.0))
    wild = [cell("Wanda", 0.9, seed, kl=0.1, perplexity=p) for seed, p in high]
    tame = [cell("MAMA", 0.9, seed, kl=0.2, perplexity=p) for seed, p in low]
    page = page_of(wild, tame, cells_of(OURS, 0.9, 0.3, 0.3, 0.3))
    (table,) = tables_in(page, "KL to the dense model")
    assert table["Wanda"] == ["0.100 ± 0.000 †"], "shown, but not the best"
    assert table["MAMA"] == ["**0.200 ± 0.000**"]
    assert "† broken: worse than a unigram model, whose perplexity is 37.2" in page
    (comparison,) = tables_in(page, f"{OURS} against each row")
    assert comparison["Wanda"][0].startswith("no claim †")
    assert comparison["MAMA"][0].startswith("**loses**")


def test_unknown_unigram_breaks_nothing():
    page = page_of(cells_of(OURS, 0.9, 9.0, perplexity=1e9), unigram=None)
    assert "†" not in page


def test_a_broken_headline_can_lose():
    grid = grid_of(
        cells_of(OURS, 0.9, 5.0, 5.1, 5.2, perplexity=40.0), cells_of(RIVAL, 0.9, 1.0, 1.0, 1.0)
    )
    assert compare(grid, KL, RIVAL, 0.9).verdict is Verdict.LOSES


def test_what_is_not_finite_is_never_the_best():
    page = page_of(
        cells_of(OURS, 0.9, 3.0, 4.0, 3.5),
        cells_of(RIVAL, 0.9, 5.0, 6.0, 5.5),
        cells_of("Wanda", 0.9, 0.1, None, 0.1, perplexity=None),
    )
    (table,) = tables_in(page, "KL to the dense model")
    assert table["Wanda"] == ["not finite †"]
    assert table[OURS] == ["**3.50 ± 0.50**"]
    (comparison,) = tables_in(page, f"{OURS} against each row")
    assert comparison["Wanda"] == ["no claim †<br>not finite"]
    assert tables_in(page, "Perplexity of words")[0]["0.90"] == ["2.000", "2.000", "not finite †"]


def test_not_finite_against_finite():
    sound, failed, half = (1.0, 1.0), (None, None), (None, 1.0)
    for ours, theirs, verdict in (
        (failed, sound, Verdict.LOSES),
        (half, sound, Verdict.NO_CLAIM),
        (sound, failed, Verdict.NO_CLAIM),
        ((None,), (1.0,), Verdict.NO_CLAIM),
        (failed, failed, Verdict.NO_CLAIM),
    ):
        grid = grid_of(cells_of(OURS, 0.9, *ours), cells_of(RIVAL, 0.9, *theirs))
        assert compare(grid, KL, RIVAL, 0.9).verdict is verdict


def test_another_sparsity_is_shown_and_not_compared():
    far = cells_of("SDMPrune-style", 0.5, 0.01, 0.01, 0.01, measured=0.469)
    near = cells_of("Wanda", 0.5, 0.2, 0.2, 0.2, measured=0.4967)
    page = page_of(cells_of(OURS, 0.5, 0.3, 0.3, 0.3), far, near)
    (table,) = tables_in(page, "KL to the dense model")
    assert table["SDMPrune-style"] == ["0.0100 ± 0.0000 (at 0.469)"]
    assert table["Wanda"] == ["**0.200 ± 0.000**"]
    (comparison,) = tables_in(page, f"{OURS} against each row")
    assert comparison["SDMPrune-style"][0].startswith("no claim<br>")
    assert comparison["Wanda"][0].startswith("**loses**")


def test_places_without_cells_and_with_fewer_seeds():
    page = page_of(
        cells_of(OURS, 0.5, 0.1, 0.2, 0.3),
        cells_of(RIVAL, 0.5, 0.4, 0.6),
        cells_of(RIVAL, 0.9, 4.0),
    )
    (table,) = tables_in(page, "KL to the dense model")
    assert table[OURS] == ["**0.200 ± 0.100**", "-"]
    assert table[RIVAL] == ["0.500 ± 0.141 (2 seeds)", "4 (1 seed)"]


def test_patterns_stand_apart_and_meet_their_peers():
    groups = [
        cells_of(OURS, 0.5, 0.1, 0.1, 0.1),
        cells_of(OURS, 0.9, 3.0, 3.0, 3.0),
        cells_of("MAMA 2:4", 0.5, 0.7, 0.7, 0.7),
        cells_of("MAMA + LS 2:4", 0.5, 0.5, 0.5, 0.5),
        cells_of("Wanda 2:4", 0.5, 1.0, 1.0, 1.0),
        cells_of("Wanda 4:8", 0.5, 0.2, 0.2, 0.2),
    ]
    grid = grid_of(*groups)
    assert peer(grid, "Wanda 2:4") == "MAMA + LS 2:4"
    assert peer(grid, "Wanda 4:8") is None
    assert compare(grid, KL, "MAMA + LS 2:4", 0.5) is None, "it stands for the headline"
    page = page_of(*groups)
    free, patterns = tables_in(page, "KL to the dense model")
    assert list(free) == ["method", OURS]
    assert patterns["method"] == ["0.50"]
    assert patterns["MAMA + LS 2:4"] == ["**0.500 ± 0.000**"]
    assert patterns["Wanda 4:8"] == ["0.200 ± 0.000"], "alone with its pattern"
    (comparison,) = tables_in(page, f"{OURS} against each row")
    assert comparison["Wanda 2:4 (compared: MAMA + LS 2:4)"] == ["**wins**<br>0.5 (+0.500 ± 0.000)"]
    assert f"Not compared, for want of {OURS} with the same N:M pattern: Wanda 4:8." in page


@pytest.mark.parametrize(("seeds", "text"), [(1, "0.5 (+1)"), (2, "0.5 (+1.00 ± 0.00)")])
def test_one_seed_or_two_claim_nothing(seeds, text):
    page = page_of(cells_of(OURS, 0.9, *seeds * [1.0]), cells_of(RIVAL, 0.9, *seeds * [2.0]))
    assert f"Fewer than 3 seeds: no claim is made of {OURS}" in page
    (table,) = tables_in(page, f"{OURS} against each row")
    assert table[RIVAL] == [text]


def test_the_papers_tables():
    rows = {
        "magnitude, model-wide": (1.5, 3.0),
        "Wanda": (1.25, 84.905),
        "magnitude": (1.75, 48414.551),
        RIVAL: (1.125, 20.0),
        "-weights": (104948.891, None),
    }
    groups = [
        [cell(row, level, 1, perplexity=p) for level, p in zip((0.5, 0.7), values, strict=True)]
        for row, values in rows.items()
    ]
    page = page_of(*groups)
    (table,) = tables_in(page, "Perplexity of words")
    assert table == {
        "pruning level": list(rows),
        "0.00": ["1.040"] * 5,
        "0.50": ["1.500", "1.250", "1.750", "**1.125**", "104,949 †"],
        "0.70": ["**3.000**", "84.9 †", "48,415 †", "20", "not finite †"],
    }
    (pair,) = tables_in(page, "By |weights| and by -|weights|")
    assert pair == {
        "pruning level": ["magnitude, model-wide", "-weights"],
        "0.00": ["1.040", "1.040"],
        "0.50": ["1.500", "104,949 †"],
        "0.70": ["3.000", "not finite †"],
    }
    assert "By |weights|" not in page_of(*groups[:4])


def test_text_perplexity_has_its_own_unigram():
    group = [cell(OURS, 0.5, 1, text=150.0), cell(RIVAL, 0.5, 1, text=250.0)]
    page = page_of(group, text_unigram=200.0)
    (table,) = tables_in(page, "Perplexity of text from elsewhere")
    assert table["0.00"] == ["21.5", "21.5"]
    assert table["0.50"] == ["150", "250 †"]
    assert "text from elsewhere" not in page_of(cells_of(OURS, 0.5, 1.0))


def test_recovery_and_cost():
    page = page_of(
        recovered_cells(OURS, 0.9, 0.9, 0.92, 0.94),
        recovered_cells(RIVAL, 0.9, 0.8, 0.83, 0.83, steps=1200),
        cells_of(RIVAL, 0.5, 1.0, 1.0, seconds=7.0),
    )
    table, cost = tables_in(page, "Accuracy after recovery")
    assert table == {
        "method": ["0.90"],
        OURS: ["**92.0 ± 2.0 %**"],
        RIVAL: ["82.0 ± 1.7 %"],
    }, "levels without recovery are left out"
    assert cost[OURS] == ["300", "42"]
    assert cost[RIVAL] == ["1,200", "42"]
    (comparison,) = tables_in(page, f"{OURS} against each row, recovered")
    # Differences 0.10, 0.09, 0.11: sd 0.01.
    assert comparison[RIVAL] == ["**wins**<br>+10.0 ± 0.6 %"]
    (seconds,) = tables_in(page, "Seconds of pruning")
    assert seconds == {"method": ["seconds"], OURS: ["3"], RIVAL: ["3"]}
    assert "recovery" not in page_of(cells_of(OURS, 0.9, 1.0)).replace("no recovery", "")


def test_recovered_models_are_broken_by_their_own_perplexity():
    sound = {**numbers(perplexity=2.0), "steps": 1, "seconds": 1.0}
    group = [cell(OURS, 0.9, 1, perplexity=1e6, recovered=sound)]
    grid = grid_of(group)
    assert grid.is_broken(ACCURACY, OURS, 0.9)
    assert not grid.is_broken(RECOVERED_ACCURACY, OURS, 0.9)


def test_two_cells_in_one_place_are_a_mistake():
    with pytest.raises(AssertionError, match="two cells"):
        grid_of(cells_of(OURS, 0.9, 1.0), cells_of(OURS, 0.9, 2.0))


def many_cells(rows, levels, seeds):
    """Numbers of the size that a real sweep has."""
    return [
        cell(
            row,
            level,
            seed,
            measured=level - 0.03 if row == "SDMPrune-style" else None,
            kl=(kl := min(20.0, (i + 1) * level**4 * (1 + seed / 50))),
            perplexity=1.04 * math.exp(kl) if kl < 20 else None,
            accuracy=math.exp(-kl),
            recovered={**numbers(), "steps": 3, "seconds": 1.0} if level == 0.9 else None,
        )
        for i, row in enumerate(rows)
        for level in levels
        if ":" not in row or level == 0.5
        for seed in seeds
    ]


ODD = {
    "many": many_cells(SETTINGS, (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), (1, 2, 42)),
    "few": many_cells((RIVAL, OURS), (0.9,), (42,)),
    "one level": many_cells(SETTINGS, (0.5,), (1, 2)),
    "no headline": many_cells((RIVAL, "Wanda"), (0.5, 0.9), (1, 2)),
    "controls alone": many_cells(("random", "-weights"), (0.5, 0.9), (1, 2)),
    "patterns alone": many_cells(("Wanda 2:4", "MAMA 2:4"), (0.5,), (1, 2)),
    "odd name": many_cells((OURS, "odd_$name|"), (0.5, 0.9), (1,)),
    "nothing pruned": cells_of(OURS, 0.0, 0.0, 0.0) + cells_of(RIVAL, 0.5, 0.1, 0.1),
    "no number": cells_of(OURS, 0.9, None, None, perplexity=None),
    "levels apart": cells_of(OURS, 0.5, 0.1, 0.2) + cells_of(RIVAL, 0.9, 3.0, 4.0),
    "no cell": [],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_sweeps_have_a_page_and_whole_pictures(tmp_path, name):
    folder = tmp_path / "new" / "folder"
    write_sweep_report(folder, ODD[name], reference(), DESCRIPTION)
    page = (folder / "table.md").read_text()
    linked = re.findall(r"!\[.+\]\((plots/\w+\.png)\)", page)
    files = sorted(tmp_path.rglob("*.png"))
    assert sorted(path.rsplit("/")[-1] for path in linked) == [path.name for path in files]
    assert len(files) >= {"no cell": 0, "no number": 1}.get(name, 3)
    for path in files:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1000
        assert 200 < height < 1400
        assert len(data) > 5000
    assert not re.search(r"\b(nan|inf)\b", page)


def title_of(*groups, measure=KL):
    grid = grid_of(*groups)
    (picture,) = (picture for picture in PICTURES if picture.measure == measure)
    return picture_title(grid, picture, grid.rows, grid.levels)


def test_titles_count_levels_won():
    groups = [
        cells_of(OURS, 0.5, 0.1),
        cells_of(OURS, 0.7, 2.0),
        cells_of(OURS, 0.9, 3.0),
        cells_of(OURS, 0.99, 4.0),
        cells_of("MAMA", 0.5, 0.01),  # the same method
        cells_of("Wanda", 0.5, 0.2),
        cells_of("Wanda", 0.7, 1.0),
        cells_of("Wanda", 0.9, 9.0, perplexity=40.0),  # broken
        cells_of("Wanda 2:4", 0.5, 0.05),  # another pattern
        cells_of("SDMPrune-style", 0.99, 0.1, measured=0.5),  # another sparsity
    ]
    won = f"{OURS} has a lower KL to the dense model than every other"
    assert title_of(*groups) == f"{won} method at 1 of the 2 sparsity levels that carry a claim"
    siblings = [cells_of("MAMA", 0.5, 0.3), cells_of("MAMA", 0.7, 3.0)]
    assert title_of(*groups[:2], *siblings) == f"{won} row at 2 of the 2 sparsity levels"
    alone = f"{OURS} has no other row to compare its KL to the dense model with"
    assert title_of(*groups[:2]) == alone


def test_title_of_one_level():
    groups = [
        cells_of("Wanda", 0.9, 0.9, accuracy=0.5),
        cells_of(RIVAL, 0.9, 0.8, accuracy=0.6),
        cells_of(OURS, 0.9, 0.85, accuracy=0.55),
    ]
    assert title_of(*groups) == (
        f"At 90.0 % sparsity the KL to the dense model of {OURS} is 0.85, that of {RIVAL}, the "
        "best other method, 0.8"
    )
    end = f"is 55.0 %, that of {RIVAL}, the best other method, 60.0 %"
    assert title_of(*groups, measure=ACCURACY).endswith(end)


def draw(grid, rows, levels):
    points = {row: row_points(grid, KL, row, levels) for row in rows}
    return draw_levels(grid, KL, points, levels, title="Title", label="KL")


def test_lines_show_means_at_measured_places():
    levels = [0.5, 0.7, 0.9]
    grid = grid_of(
        cells_of(OURS, 0.5, 0.1, 0.3),
        cells_of(OURS, 0.7, 0.4, 0.6),
        cells_of(OURS, 0.9, 2.0, 4.0, perplexity=50.0),
        cells_of("SDMPrune-style", 0.5, 1.0, measured=0.45),
        cells_of("SDMPrune-style", 0.7, 2.0, measured=0.65),
        cells_of("SDMPrune-style", 0.9, 3.5, measured=0.95),
        cells_of("random", 0.5, 9.0),
        cells_of("random", 0.7, None),
        cells_of("random", 0.9, 9.5),
    )
    figure = draw(grid, grid.rows, levels)
    (axes,) = figure.axes
    ours, structured, control = (line for line in axes.lines if len(line.get_xdata()) > 1)
    assert list(ours.get_xdata()) == [0, 1, 2]
    assert list(ours.get_ydata()) == pytest.approx([0.2, 0.5, 3.0])
    assert list(structured.get_xdata()) == pytest.approx([-0.25, 0.75, 2.25])
    assert list(structured.get_ydata()) == [1.0, 2.0, 3.5]
    assert list(control.get_xdata()) == [0, 2], "not finite is left out"
    assert list(control.get_ydata()) == [9.0, 9.5]
    assert to_hex(ours.get_color()) == BLUE.lower()
    assert to_hex(control.get_color()) == GREY.lower()
    assert ours.get_linewidth() > 2 * structured.get_linewidth() > 2 * control.get_linewidth()
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[3.0]]
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "random",
        "SDMPrune-style",
        OURS,
    ]


def test_rows_look_different():
    levels = [0.5, 0.9]
    rows = [row for row in SETTINGS if ":" not in row]
    grid = grid_of(*(cells_of(row, level, 1.0) for row in rows for level in levels))
    (axes,) = draw(grid, rows, levels).axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(rows)


def test_controls_do_not_squeeze_the_others():
    levels = [0.5, 0.9]
    grid = grid_of(
        cells_of(OURS, 0.5, 0.5),
        cells_of(OURS, 0.9, 1.0),
        cells_of("-weights", 0.5, 2e4),
        cells_of("-weights", 0.9, 3e4),
    )
    (axes,) = draw(grid, grid.rows, levels).axes
    low, high = axes.get_ylim()
    assert 0.3 < low < 0.5
    assert 1.0 < high < 2.0
    assert "controls beyond the frame" in axes.get_xlabel()
    (axes,) = draw(grid, ["-weights"], levels).axes
    assert axes.get_ylim()[1] > 3e4
