"""Plain shards, and the layouts that are refused. DeepSpeed's own are in tests/distributed."""

import pytest
import torch
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from pipeline.sparsity.layouts import check_optimizer, check_zero_config
from pipeline.sparsity.shards import plain_shards


def test_a_plain_shard_is_the_whole_weight():
    weight = nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    sharded = plain_shards({"w": weight}, optimizer)
    shard = sharded.shards["w"]
    assert (shard.offset, shard.numel, shard.shape, sharded.group) == (0, 15, (3, 5), None)
    assert sharded.shapes == {"w": (3, 5)}
    shard.weight[7] = 2.0
    assert weight[1, 2] == 2.0
    assert shard.gradient is None
    assert sharded.moments(shard, "exp_avg") is None
    weight.grad = torch.ones(3, 5)
    optimizer.step()
    assert shard.gradient.shape == (15,)
    sharded.moments(shard, "exp_avg")[7] = 9.0
    assert optimizer.state[weight]["exp_avg"][1, 2] == 9.0
    optimizer.param_groups[0]["lr"] = 0.05
    assert sharded.learning_rate(shard.flat) == 0.05


class Adam8bit(torch.optim.AdamW):
    """Stands in for an optimizer of a package that is not installed; only its module counts."""

    __module__ = "bitsandbytes.optim.adamw"


class Hookless:
    """Steps without being a torch optimizer."""

    def __init__(self, parameters):
        self.param_groups = [{"params": parameters}]


@pytest.mark.parametrize(
    ("dtype", "make", "message"),
    [
        (torch.float32, lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))]), "not train w"),
        (torch.bfloat16, lambda p: torch.optim.SGD([p]), "load the model in float32"),
        (torch.float32, lambda p: Adam8bit([p]), "often 8-bit.*set adamw_torch_fused"),
        (torch.float32, lambda p: Hookless([p]), "fires no hooks.*set adamw_torch_fused"),
    ],
)
def test_plain_layouts_that_cannot_be_served_are_refused(dtype, make, message):
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        plain_shards({"w": weight}, make(weight))


def test_weights_flattened_by_fsdp_are_refused():
    weight = nn.Parameter(torch.ones(2))
    weight._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"FSDP.*set DEEPSPEED"):
        check_optimizer(torch.optim.SGD([weight]), {"w": weight})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"ratio: 0.5: .* set 1.0"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, r"nvme: .* set cpu"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload: true"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, r"offload_param.*set cpu"),
        ({"zero_hpz_partition_size": 2}, r"zero_hpz_partition_size: 2 .* set 1"),
        ({"zenflow": {}}, r"zenflow: .* leave it out"),
        ({"zero_quantized_weights": True}, r"zero_quantized_weights: true: .* set false"),
    ],
)
def test_zero_layouts_that_cannot_be_served_are_refused(values, message):
    config = DeepSpeedZeroConfig(stage=3, **values)
    with pytest.raises(ValueError, match=message):
        check_zero_config(config)


def test_low_precision_masters_are_refused():
    bf16 = DeepSpeedBF16Config(enabled=True, bf16_master_weights_and_grads=True)
    fp16 = DeepSpeedFP16Config(enabled=True, fp16_master_weights_and_grads=True)
    for section in (bf16, fp16):
        with pytest.raises(ValueError, match=r"16-bit master weights.*set false"):
            check_zero_config(DeepSpeedZeroConfig(stage=2), (section,))


def test_every_fault_is_named_at_once():
    config = DeepSpeedZeroConfig(
        stage=3, zero_hpz_partition_size=2, offload_optimizer={"device": "cpu", "ratio": 0.0}
    )
    with pytest.raises(ValueError, match=r"ratio(.|\n)*hpZ"):
        check_zero_config(config)


def test_what_is_served_passes():
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    precision = (DeepSpeedBF16Config(enabled=True), DeepSpeedFP16Config())
    for values in ({}, offload):
        check_zero_config(DeepSpeedZeroConfig(stage=3, **values), precision)
