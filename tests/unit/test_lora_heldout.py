"""The best student of a LoRA stage: merged, masked, with its movement, and without a trace."""

from unittest import mock

import torch
from transformers import TrainerCallback

from pipeline.config import Config
from pipeline.config_loading import load_config
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.lora import lora_layers
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.low_rank import proposal
from pipeline.sparsity.masks import load_masks
from pipeline.sparsity.storage import load_state
from pipeline.stages.inputs import open_task
from pipeline.stages.training import Training, train
from pipeline.training.probe import Probe
from tests.unit.test_heldout import CONFIG, SMALL
from tests.unit.test_lora_training import IDS, distill_trainer, sparsity_of, student


class Snapshots(TrainerCallback):
    """Logits and proposed weights after each step."""

    def __init__(self, model):
        self.model, self.steps = model, {}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        weights = {
            name: proposal(*layer.factors, layer.scale).clone()
            for name, layer in lora_layers(self.model).items()
        }
        self.steps[state.global_step] = self.model(IDS).logits.clone(), weights


def test_the_best_student_is_the_one_of_its_step_and_measuring_changes_nothing(tmp_path):
    tokenizer = load_tokenizer("bundled")
    config = load_config(CONFIG, SMALL | {"evaluate.every_steps": 1})
    inputs = open_task(config)
    accuracies, real, ask = [0.1, 0.5, 0.3], [], Probe.accuracy

    def accuracy(probe):
        real.append(ask(probe))
        return accuracies[len(real) - 1]

    ends = []
    for name, values in (("measured", config), ("silent", Config())):
        sparsity, masks = sparsity_of(tokenizer, tmp_path / "prune", schedule=None)
        model = student(tokenizer, masks)
        start = {n: weight.clone() for n, weight in prunable_weights(model).items()}
        out = tmp_path / name
        trainer = distill_trainer(tokenizer, out, model, 3, save_strategy="no")
        snapshots = Snapshots(trainer.model)
        trainer.add_callback(snapshots)
        with mock.patch.object(Probe, "accuracy", accuracy):
            ends.append(train(values, inputs, trainer, sparsity, out, None))
        ends.append(trainer.model.state_dict())
        if name == "measured":
            logits, proposals = snapshots.steps[2]
            weights = trainer.sparsity.weights
    done, measured, _, silent = ends
    assert done == Training(3, {"step": 2, "accuracy": 0.5})
    assert len(real) == 3
    assert all(torch.equal(measured[key], silent[key]) for key in silent)

    saved = load_model(str(tmp_path / "measured" / "model"))
    assert (saved(IDS).logits - logits).abs().max() <= 1e-6
    state = load_state(tmp_path / "measured", weights)
    final = load_masks(tmp_path / "measured" / "mask.safetensors")
    for name, weight in prunable_weights(saved).items():
        assert torch.equal(final[name], masks[name])
        assert not weight[~masks[name]].any(), name
        now, before = proposals[name], start[name]
        change = torch.where(masks[name], now.abs() - before.abs(), now - before)
        assert torch.allclose(state.movement[name], change.flatten(), atol=1e-6)
        assert change.abs().max() > 1e-3
