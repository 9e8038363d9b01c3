"""Where the frozen teacher lives while the student trains.

    placement   memory per rank, d = bytes of teacher.dtype (4 or 2), N weights, R ranks
    device      d N on the accelerator, next to the student: fastest
    cpu         d N in the host's memory, nothing on the accelerator; it computes there, slowly, and
                only tokens and results travel. R ranks of one machine hold R copies
    zero3       d N / R on the accelerator, and d times the weights of the layers gathered at the
                moment: DeepSpeed's stage3_max_live_parameters and stage3_prefetch_bucket_size bound
                them. Each forward pass sends every weight to every rank. d is of the type
                DeepSpeed computes in: a float32 teacher becomes bf16 under bf16

To each comes the head's work, about four tensors of `chunked_head.MAX_LOGITS` fp32 values, and the
activations of one micro-batch.

`zero3` is how TRL prepares its reference model: a second DeepSpeed engine without an optimizer.
Left out: a teacher whose weights stay on the CPU while the accelerator computes.
"""

from accelerate import Accelerator, DeepSpeedPlugin
from torch import nn
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed

from pipeline.errors import UserError
from pipeline.models.chunked_head import chunked_head

PLACEMENTS = ("device", "cpu", "zero3")
HALF = (("bf16", "bfloat16"), ("fp16", "float16"))


def place_teacher(
    model: PreTrainedModel, placement: str, accelerator: Accelerator
) -> PreTrainedModel | nn.Module:
    """Freezes a teacher and puts it where it shall live.

    Args:
        model: On any device. For `zero3` either whole or loaded in pieces (loaded after the
            training arguments exist), which spares each rank the whole one; otherwise whole.
        placement: One of `PLACEMENTS`.
        accelerator: The student's.

    Returns:
        What to call for a forward pass: the model, or a DeepSpeed engine around it.

    Raises:
        UserError: `zero3` without ZeRO-3, or with a teacher of a type that DeepSpeed does not
            convert: it makes a whole float32 one bf16, and no other change.
    """
    assert placement in PLACEMENTS
    model.requires_grad_(False).eval()
    chunked_head(model)
    in_pieces = any(hasattr(weight, "ds_id") for weight in model.parameters())
    if placement != "zero3":
        assert not in_pieces
        return model.to("cpu" if placement == "cpu" else accelerator.device)
    dtype = str(model.dtype).removeprefix("torch.")
    plugin = accelerator.state.deepspeed_plugin
    fault = placement_fault(placement, dtype, plugin, in_pieces=in_pieces)
    if fault is not None:
        raise UserError(fault)
    return prepare_deepspeed(model, accelerator)


def placement_fault(
    placement: str, dtype: str, plugin: DeepSpeedPlugin | None, *, in_pieces: bool = False
) -> str | None:
    """Why a launch cannot place a teacher so; None where it can.

    Args:
        placement: One of `PLACEMENTS`.
        dtype: The teacher's, `float32` or `bfloat16`.
        plugin: DeepSpeed's settings; None without it.
        in_pieces: Whether the teacher was loaded in pieces.
    """
    if placement != "zero3":
        return None
    if plugin is None or plugin.zero_stage != 3:
        return (
            "teacher.placement: zero3: this run has no ZeRO-3 to share the teacher's weights out; "
            "launch with configs/accelerate/gpu_zero3.yaml, or set device or cpu instead"
        )
    computes_in = next((t for key, t in HALF if _is_on(plugin, key)), "float32")
    if dtype != computes_in and (computes_in == "float32" or in_pieces):
        return (
            f"teacher.dtype: {dtype}: DeepSpeed computes in {computes_in} here and "
            f"teacher.placement is zero3; set {computes_in}, or teacher.placement: device, instead"
        )
    return None


def _is_on(plugin: DeepSpeedPlugin, key: str) -> bool:
    return plugin.deepspeed_config.get(key, {}).get("enabled") is True
