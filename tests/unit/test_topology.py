"""Launcher settings that are refused before anything runs."""

import re

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.utils import DistributedType
from trl import SFTConfig

from pipeline.errors import UserError
from pipeline.training.teacher_placement import placement_fault
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


def test_numbers_that_a_deepspeed_file_fixes_are_compared_at_once(tmp_path):
    built = with_zero(tmp_path)
    config = built.deepspeed_plugin.hf_ds_config.config
    config |= {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    wanted = (
        r"^deepspeed_config\.train_micro_batch_size_per_gpu: 4: grpo has "
        r"per_device_train_batch_size 8 on 1 ranks; set auto, or 8, instead$"
    )
    with pytest.raises(UserError, match=wanted):
        check_topology("grpo", built, uses_muon=False)
    config["train_micro_batch_size_per_gpu"] = 8
    check_topology("grpo", built, uses_muon=False)
    assert config["train_micro_batch_size_per_gpu"] == 8


def test_precision_of_the_launcher_against_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        UserError, match=r"^grpo\.bf16: false: .*set grpo\.bf16: true, or mixed_pre"
    ):
        check_topology("grpo", arguments(tmp_path), uses_muon=False)
    built = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to="none")
    check_topology("grpo", built, uses_muon=False)


def test_one_process_that_sees_many_gpus(tmp_path):
    built = arguments(tmp_path)
    built._n_gpu = 4
    with pytest.raises(UserError, match=r"num_processes: 1: one process sees 4 GPUs.*CUDA_VISIBLE"):
        check_topology("grpo", built, uses_muon=False)


@pytest.mark.parametrize(
    ("stage", "half", "dtype", "why"),
    [
        (2, False, "float32", "has no ZeRO-3"),
        (3, False, "bfloat16", "computes in float32 here .*set float32"),
        (3, True, "float32", None),
        (3, True, "bfloat16", None),
    ],
)
def test_where_a_teacher_can_be_cut_up(tmp_path, stage, half, dtype, why):
    plugin = with_zero(tmp_path, stage=stage).deepspeed_plugin
    plugin.deepspeed_config["bf16"] = {"enabled": half}
    fault = placement_fault("zero3", dtype, plugin)
    assert fault is None if why is None else re.search(why, fault)
    assert placement_fault("device", dtype, plugin) is None
