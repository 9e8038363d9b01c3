"""Launcher settings that are refused before anything runs."""

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.utils import DistributedType
from trl import SFTConfig

from pipeline.errors import UserError
from pipeline.training.topology import check_topology

pytestmark = pytest.mark.distributed  # imports DeepSpeed


def arguments(tmp_path, **values):
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **values)


def with_zero(tmp_path, **values):
    built = arguments(tmp_path)
    built.deepspeed_plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", **values},
        }
    )
    return built


@pytest.mark.parametrize(
    ("optim", "why"),
    [
        ("adamw_bnb_8bit", "distill.optim: adamw_bnb_8bit: its moments .* set adamw_torch_fused"),
        ("galore_adamw_layerwise", "steps inside backward"),
    ],
)
def test_optimizers_without_plain_moments_or_hooks(tmp_path, optim, why):
    with pytest.raises(UserError, match=why):
        check_topology("distill", arguments(tmp_path, optim=optim), uses_muon=False)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "only supported for ZeRO Stage 3"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            r"ratio: 0\.5: .* set 1\.0",
        ),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "nvme: .* cpu"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "hpZ"),
    ],
)
def test_layouts_without_one_fp32_copy_in_memory(tmp_path, values, why):
    with pytest.raises(UserError, match=why):
        check_topology("grpo", with_zero(tmp_path, **values), uses_muon=False)


def test_muon_needs_matrices(tmp_path):
    with pytest.raises(UserError, match=r"distill\.muon_learning_rate: .* set null"):
        check_topology("distill", with_zero(tmp_path), uses_muon=True)


def test_fsdp(tmp_path):
    built = arguments(tmp_path)
    before = built.distributed_state.distributed_type
    built.distributed_state.distributed_type = DistributedType.FSDP
    try:
        with pytest.raises(UserError, match=r"FSDP: .* DEEPSPEED"):
            check_topology("grpo", built, uses_muon=False)
    finally:
        built.distributed_state.distributed_type = before


def test_what_is_served_passes(tmp_path):
    check_topology("distill", arguments(tmp_path), uses_muon=True)
    check_topology("grpo", with_zero(tmp_path), uses_muon=False)
    offload = {"device": "cpu", "ratio": 1.0}
    check_topology("grpo", with_zero(tmp_path, stage=3, offload_optimizer=offload), uses_muon=False)
