"""Movement against magnitude: every weight is counted once, ranks and medians are theirs."""

import pytest
import torch

from pipeline.evaluation import magnitude_plot
from pipeline.evaluation.magnitude_plot import BINS, count_pairs, plot_magnitude, rank_correlation


def spread(num_weights, seed):
    """Values over a few decades, and others that follow them loosely."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(num_weights, generator=generator).exp() * 1e-2
    return sizes, sizes * torch.randn(num_weights, generator=generator).exp()


def ranks(values):
    return values.argsort().argsort().double()


def test_every_weight_is_counted_once_whatever_it_is():
    sizes = torch.tensor([0.0, 1e-40, -0.5, 3.0, 1e30])
    counts = count_pairs([(sizes, sizes), (torch.tensor([0.5]), torch.tensor([0.0]))])
    assert counts.shape == (BINS, BINS)
    assert counts.sum() == 6
    assert counts[0, 0] == 2  # zero, and what is too small for a bin
    assert counts[-1, -1] == 1


def test_rank_correlation_is_that_of_the_weights_themselves():
    sizes, movement = spread(20000, seed=0)
    wanted = torch.corrcoef(torch.stack([ranks(sizes), ranks(movement)]))[0, 1].item()
    assert rank_correlation(count_pairs([(sizes, movement)])) == pytest.approx(wanted, abs=0.01)
    assert rank_correlation(count_pairs([(sizes, -1 / sizes)])) == pytest.approx(-1, abs=0.01)


def test_without_variation_there_is_no_correlation():
    assert rank_correlation(count_pairs([])) is None
    assert rank_correlation(count_pairs([(torch.ones(5), torch.rand(5))])) is None


def test_lines_are_medians_by_size(monkeypatch):
    drawn = []
    monkeypatch.setattr(magnitude_plot, "finish", lambda figure, title: drawn.append(figure))
    sizes, movement = spread(50000, seed=1)
    nothing = count_pairs([])
    counts = {"kept": count_pairs([(sizes, movement)]), "came back": nothing, "pruned": nothing}
    plot_magnitude(counts, kept="gradient", pruned="proposed")
    (line,) = drawn[0].axes[0].lines
    for place, median in zip(line.get_xdata(), line.get_ydata(), strict=True):
        step = 10 ** (1 / 32)  # half a bin to either side
        inside = (sizes > place / step) & (sizes <= place * step)
        assert median == pytest.approx(movement[inside].median().item(), rel=10 ** (1 / 16) - 1)
    assert not drawn[0].axes[1].lines


def test_the_title_says_what_came_back():
    sizes, movement = spread(300, seed=2)
    pieces = {"kept": slice(0, 150), "came back": slice(150, 200), "pruned": slice(200, 300)}
    counts = {name: count_pairs([(sizes[s], movement[s])]) for name, s in pieces.items()}
    title = plot_magnitude(counts, kept="squared", pruned="negative_gradient").title
    assert title.startswith("25.0 % of the kept weights had been pruned and came back; movement")


def test_a_run_that_pruned_nothing_and_moved_nothing_is_drawn_too():
    still = count_pairs([(torch.rand(100), torch.zeros(100))])
    counts = {"kept": still, "came back": count_pairs([]), "pruned": count_pairs([])}
    picture = plot_magnitude(counts, kept="displacement", pruned="proposed")
    assert picture.title == "0.0 % of the kept weights had been pruned and came back"


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_both_kinds_of_kept_weights_fit_a_narrow_page():
    sizes, movement = spread(30000, seed=3)
    counts = {name: count_pairs([(sizes, movement)]) for name in ("kept", "came back", "pruned")}
    plot_magnitude(counts, kept="gradient", pruned="negative_gradient")
