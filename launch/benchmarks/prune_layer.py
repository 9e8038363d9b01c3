"""One decoder layer to prune: random weights, correlated inputs, their statistics.

Hidden states are drawn from a vocabulary of vectors whose covariance has the eigenvalues 1/i, in a
random basis, times channel sizes that differ by a log-normal factor: as in trained models a few
directions hold most of the power. What the later matrices read follows from random weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from launch.benchmarks.shapes import Shape
from launch.benchmarks.timing import Side
from pipeline.models.prunable import decoder_layers, prunable_weights
from pipeline.pruning.admm import admm_mask
from pipeline.pruning.batches import calibration_batches
from pipeline.pruning.block_entropy import entropy_increases
from pipeline.pruning.calibration import calibrate, first_layer_input
from pipeline.pruning.calibration_movement import calibration_movement
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.layer_steps import layer_steps
from pipeline.pruning.least_squares import normal_equations
from pipeline.pruning.mama import ACTIVATION_POWER
from pipeline.pruning.matrix_pruner import MatrixPruner
from pipeline.pruning.methods import prune_model
from pipeline.pruning.redistribution import redistribute
from pipeline.pruning.sdmprune import channel_importance

CHANNEL_SPREAD = 0.5
"""Standard deviation of the logarithm of a channel's size."""
PRUNERS = {
    "magnitude": ("magnitude", "none"),
    "wanda": ("wanda", "none"),
    "sparsegpt": ("sparsegpt", "none"),
    "mama, score": ("mama", "none"),
    "alps": ("alps", "none"),
    "mama + admm": ("mama", "admm"),
}
"""Name of a side to method and redistribution. Each starts with statistics that are there."""
SOLVE = "mama, least squares"
"""The side that gets a mask and redistributes."""


@dataclass(frozen=True, kw_only=True)
class LayerShape(Shape):
    """A decoder layer and how it is timed; `batch_size` sequences calibrate it."""

    num_layers: int = 1
    num_rounds: int
    """Samples of each side; 1 leaves out the round that is not counted, too."""
    num_admm_steps: int | None = None
    """Steps of ADMM that are timed, in the place of the methods that take turns as a whole."""
    wanda_goal: float | None = None
    """Most that Wanda may take, calibration included, in calibration forward passes."""
    least_squares_goal: float | None = None
    """Most that least squares may take, in times of SparseGPT."""


@dataclass(frozen=True, kw_only=True)
class LayerShapes:
    """What the suite measures."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sparsities: list[float]
    """Of every method."""
    iterative_sparsities: list[float]
    """Of the methods that take turns between mask and weights."""
    layers: dict[str, LayerShape]


class LayerBench:
    """A layer, its calibration batches, and the statistics of its inputs."""

    def __init__(self, shape: LayerShape):
        """Builds the layer and runs the calibration once."""
        torch.manual_seed(0)
        self.device = torch.device(shape.device)
        self.model = shape.model(self.device).eval()
        embeddings = _correlated_rows(shape.vocab_size, shape.hidden_size).to(self.device)
        self.model.model.embed_tokens.weight.data.copy_(embeddings)
        ids = torch.randint(1, shape.vocab_size, (shape.batch_size, shape.sequence_length))
        half = shape.sequence_length // 2
        self.batches = calibration_batches(
            ids[:, :half].tolist(), ids[:, half:].tolist(), pad_token_id=0, batch_size=4
        )
        self.weights = prunable_weights(self.model)
        self.dense = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.modules: dict[str, nn.Linear] = {}
        self.statistics: dict[str, InputStatistics] = {}

        def visit(name: str, module: nn.Linear, statistics: InputStatistics) -> None:
            self.modules[name], self.statistics[name] = module, statistics

        calibrate(self.model, self.batches, visit, "second_moment")
        self.movement = calibration_movement(self.model, self.batches)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the dense weights back."""
        for name, weight in self.weights.items():
            weight.copy_(self.dense[name])

    def fresh_statistics(self) -> dict[str, InputStatistics]:
        """Weight name to statistics of which nothing has been derived yet; dense stream: the same.

        Modules that share an input share them.
        """
        fresh = {
            id(found): replace(found, cross_moment=found.second_moment)
            for found in self.statistics.values()
        }
        return {name: fresh[id(found)] for name, found in self.statistics.items()}

    def calibration_sides(self, sparsity: float) -> dict[str, Side]:
        """The forward pass alone, what each look at the layer costs, and Wanda as a whole."""
        layer = decoder_layers(self.model)[0]
        streams = [first_layer_input(self.model, batch, "input_norm") for batch in self.batches]

        def forward() -> None:
            for stream in streams:
                for _ in layer_steps(layer, stream.pruned, stream.layer_arguments):
                    pass

        def statistics(needs: str) -> Callable[[], None]:
            return lambda: calibrate(self.model, self.batches, lambda *_: None, needs)

        def importance() -> None:
            channels = layer.mlp.down_proj.in_features
            live = torch.ones(1, channels, dtype=torch.bool, device=self.device)
            channel_importance(self.model, self.batches, live)

        def wanda() -> None:
            prune_model(self.model, self.batches, method="wanda", sparsity=sparsity)

        return {
            "forward pass alone": Side(torch.no_grad()(forward)),
            "with second moments": Side(statistics("second_moment")),
            "with both streams' moments": Side(statistics("cross_moment")),
            "movement": Side(lambda: calibration_movement(self.model, self.batches)),
            "sdmprune, importance": Side(importance),
            "block_entropy, entropies": Side(lambda: entropy_increases(self.model, self.batches)),
            "wanda, whole": Side(wanda, self.restore, once=True),
        }

    def pruning_side(self, name: str, sparsity: float) -> Side:
        """A side that prunes every matrix of the layer from its statistics."""
        self.restore()
        if name == SOLVE:
            return self._solve_side(sparsity)
        method, redistribution = PRUNERS[name]
        scope = "row" if method == "wanda" else "matrix"
        movement = self.movement if method == "mama" else None
        pruner = MatrixPruner(method, scope, redistribution, movement=movement)

        def run() -> None:
            statistics = self.fresh_statistics()
            for weight, module in self.modules.items():
                pruner(weight, module, statistics[weight], sparsity)

        return Side(torch.no_grad()(run))

    @torch.no_grad()
    def _solve_side(self, sparsity: float) -> Side:
        pruner = MatrixPruner("mama", "matrix", "none", movement=self.movement)
        masks = {
            name: pruner(name, module, self.statistics[name], sparsity)[0]
            for name, module in self.modules.items()
        }

        def run() -> None:
            statistics = self.fresh_statistics()
            for name, weight in self.dense.items():
                redistribute(weight, masks[name], "least_squares", statistics[name])

        return Side(torch.no_grad()(run))

    def admm_sides(self, sparsity: float, num_steps: int) -> dict[str, Side]:
        """What MAMA with ADMM computes once for a layer, then its first steps."""
        self.restore()
        equations: dict[str, tuple] = {}

        def masks(max_steps: int) -> None:
            for name, weight in self.dense.items():
                options = {"power": ACTIVATION_POWER, "max_steps": max_steps}
                admm_mask(weight, *equations[name], sparsity, "matrix", name, **options)

        def start() -> None:
            statistics = self.fresh_statistics()
            for name, weight in self.dense.items():
                equations[name] = normal_equations(weight, statistics[name])
            masks(0)

        def steps() -> None:
            masks(num_steps)

        return {
            "admm, eigenpairs": Side(torch.no_grad()(start)),
            f"admm, {num_steps} steps": Side(
                torch.no_grad()(steps), lambda: None if equations else start()
            ),
        }


def _correlated_rows(num_rows: int, size: int) -> Tensor:
    """(rows, size) with a power-law spectrum; mean square 1."""
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    spectrum = torch.arange(1, size + 1).rsqrt()
    rows = (torch.randn(num_rows, size) * spectrum) @ basis
    rows *= (CHANNEL_SPREAD * torch.randn(size)).exp()
    return rows / rows.square().mean().sqrt()
