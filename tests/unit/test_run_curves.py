"""Curves of several runs over each other: whose they are, where they stand, what is said."""

from xml.etree import ElementTree

import pytest

from pipeline.evaluation import run_curves
from pipeline.evaluation.figures import LEGEND_LINE_INCHES
from pipeline.evaluation.run_curves import overlaid_curves, plot_runs
from pipeline.evaluation.training_curves import stage_borders

LONG = {
    "distill": [{"step": s, "loss": 2.0, "kl": 1.0 / s, "sparsity": 0.9} for s in (10, 20, 40)],
    "grpo": [{"step": s, "reward": s / 10, "sparsity": 0.9} for s in (1, 2)],
}
SHORT = {
    "distill": [{"step": 5, "loss": 1.0, "kl": 0.5, "sparsity": 0.5, "heldout_accuracy": 0.25}],
    "on_policy": [{"step": 8, "loss": 0.7, "completions/mean_length": 3.0}],
}
LOGS = {"long": LONG, "short": SHORT}


def data(curves):
    return {
        run: [(curve.stage, curve.steps, curve.values) for curve in found]
        for run, found in curves.items()
    }


def test_a_stage_begins_where_the_longest_run_ends_the_one_before():
    assert stage_borders([LONG]) == ({"distill": 0, "grpo": 40}, 42)
    assert stage_borders([SHORT, LONG, {}]) == ({"distill": 0, "on_policy": 40, "grpo": 48}, 50)
    assert stage_borders([{"distill": []}, {"grpo": LONG["grpo"]}]) == ({"grpo": 0}, 2)


def test_each_run_has_its_curves_at_the_places_of_its_stages():
    starts, _ = stage_borders([LONG, SHORT])
    found = overlaid_curves(LOGS, starts)
    assert list(found) == ["accuracy", "reward", "KL to the teacher", "loss", "sparsity"]
    assert data(found["accuracy"]) == {"short": [("distill", [5], [0.25])]}
    assert data(found["reward"]) == {"long": [("grpo", [49, 50], [0.1, 0.2])]}
    assert data(found["loss"]) == {
        "long": [("distill", [10, 20, 40], [2.0, 2.0, 2.0])],
        "short": [("distill", [5], [1.0]), ("on_policy", [48], [0.7])],
    }
    assert data(found["sparsity"])["long"][1] == ("grpo", [49, 50], [0.9, 0.9])


def test_a_loss_that_is_the_kl_in_every_run_is_drawn_once():
    same = [entry | {"loss": entry["kl"]} for entry in LONG["distill"]]
    same.append({"step": 41, "kl": 0.01})  # the last step is logged apart
    starts, _ = stage_borders([LONG])
    assert "loss" not in overlaid_curves({"a": {"distill": same}}, starts)
    assert "loss" in overlaid_curves({"a": {"distill": same}, "b": LONG}, starts)


@pytest.fixture
def figures(monkeypatch):
    """Every figure as it is before it becomes a picture, by its title."""
    drawn = {}
    monkeypatch.setattr(run_curves, "finish", lambda figure, title: drawn.setdefault(title, figure))
    return drawn


def test_titles_compare_within_the_last_stage_that_two_runs_have(figures):
    assert list(plot_runs(LOGS)) == [
        f"curves/{name}.png"
        for name in ("accuracy", "reward", "KL_to_the_teacher", "loss", "sparsity")
    ]
    assert list(figures) == [
        "Accuracy on probe prompts, last logged in distill: 25.0 % in short",
        "Reward, last logged in grpo: 0.2 in long",
        "KL to the teacher, last logged in distill: 0.025 in long and 0.5 in short",
        "Loss, last logged in distill: 2 in long and 1 in short",
        "Sparsity, last logged in distill: 90.0 % in long and 50.0 % in short",
    ]


def test_lines_of_one_run_look_alike_and_steps_of_a_stage_count_from_its_beginning(figures):
    plot_runs(LOGS)
    figure = figures["Loss, last logged in distill: 2 in long and 1 in short"]
    (axes,) = figure.axes
    strong = [line for line in axes.lines if line.get_linewidth() == 2]
    assert [list(line.get_xdata()) for line in strong] == [[10, 20, 40], [5], [48]]
    assert strong[0].get_color() != strong[1].get_color() == strong[2].get_color()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [(place, label.get_text()) for place, label in ticks] == [
        (0, "0"), (20, "20"), (40, "40"), (48, "8"), (50, "2")
    ]  # fmt: skip
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["long", "short"]


def test_a_line_at_zero_is_seen_whole_and_not_below_other_numbers(figures):
    plot_runs({"a": {"grpo": [{"step": s, "reward": 0.0, "sparsity": 0.0} for s in (1, 2)]}})
    for figure in figures.values():
        (axes,) = figure.axes
        assert axes.get_ylim()[0] == 0
        assert [line.get_clip_on() for line in axes.lines if line.get_linewidth() == 2] == [False]


def test_many_runs_with_odd_names_are_told_apart(figures):
    names = [f"$_{i}$ runs/{'long/' * 9}run" for i in range(9)]
    plot_runs({name: {"distill": [{"step": 1, "kl": 9.0 - i}]} for i, name in enumerate(names)})
    ((title, figure),) = figures.items()
    assert title.endswith(f"between 1 in {names[8]} and 9 in {names[0]}")
    lines = [line for line in figure.axes[0].lines if line.get_linewidth() == 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9
    figure.draw_without_rendering()  # a name with two dollars is no formula
    assert figure.legends[0].get_texts()[0].get_text().startswith(r"\$_0\$ runs/")


def test_runs_that_logged_nothing_have_no_pictures():
    assert plot_runs({"a": {}, "b": {"distill": []}}) == {}


def test_a_legend_of_long_names_has_its_room_below_a_narrow_picture():
    heights = {}
    for name in ("a", "a" * 61):
        log = [{"step": step, "sparsity": 0.5} for step in (1, 2)]
        picture = plot_runs({name: {"distill": log}})["curves/sparsity.png"]
        height = ElementTree.fromstring(picture.narrow).get("height").removesuffix("pt")
        heights[name] = float(height) / 72
    assert heights["a" * 61] == pytest.approx(heights["a"] + 2 * LEGEND_LINE_INCHES)
