"""Pickles in a checkpoint: data is loaded, code never runs."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.safe_loading import allow_deepspeed, force_safe_loading, refuse_code
from tests.unit.test_training import distill_trainer, sparsity_of, tokenizer  # noqa: F401


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


PLACES = [
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_1.pth",
    "pytorch_model.bin",
    "adapter_model.bin",
    "global_step3/mp_rank_00_model_states.pt",
    "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v))])
def test_a_planted_pickle_is_found_without_running_it(write, place, tmp_path):
    path = tmp_path / "checkpoint-3" / place
    path.parent.mkdir(parents=True)
    write({"state": torch.ones(2), "more": Planted(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=rf"{path} holds .*nothing of checkpoint-3 was loaded"):
        refuse_code(tmp_path / "checkpoint-3")
    assert not (tmp_path / "ran").exists()


def test_what_trainers_and_deepspeed_write_is_data(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "scalers": [LossScaler(1.0), DynamicLossScaler(1.0, 1, 1.0, 1, False)],
        "stage": ZeroStageEnum(2),
        "address": fragment_address(1, 2),
    }
    torch.save(states, tmp_path / "rng_state.pth")
    torch.save(object, tmp_path / "training_args.bin")
    allow_deepspeed()
    refuse_code(tmp_path)


@pytest.mark.parametrize("place", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_loading_itself_refuses_code(place, tokenizer, tmp_path):  # noqa: F811
    """Also where nobody looked before."""
    trainer = distill_trainer(tokenizer, tmp_path / "out", 3)
    trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune"))
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    refuse_code(checkpoint)
    torch.save({"python": Planted(tmp_path / "ran")}, checkpoint / place)
    trainer = distill_trainer(tokenizer, tmp_path / "out", 6)
    trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune"))
    with pytest.raises(pickle.UnpicklingError):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()


def test_a_caller_that_asks_for_unsafe_loading_is_overruled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    force_safe_loading()
    torch.save(Planted(tmp_path / "ran"), tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
