"""Bytes of one rank that stay for a whole training stage, by the layout that trains it.

N weights, P of them prunable, R ranks, c bytes of the type that computes (2 under DeepSpeed with
bf16, else 4), Q weights of the largest layer:

    layout    weights          gradients         optimizer          movement and masks
    plain     4 N              4 N, DDP 8 N      8 N                (4 + 1/8) P
    ZeRO-1    c N              c N               16 N / R           (4 + 1/8) P / R
    ZeRO-2    c N              c N / R           16 N / R           the same
    ZeRO-3    c (N / R + Q)    c (N / R + Q)     16 N / R           the same

8 N are Adam's two moments; Muon holds one of each prunable weight, 4 P + 8 (N - P). DDP keeps its
buckets beside the gradients. 16 N / R are fp32 master weights, moments and the fp32 gradients of a
step. In bf16 that is DeepSpeed's own arithmetic for ZeRO-2 (`estimate_zero2_model_states_mem_needs`
in runtime/zero/stage_1_and_2.py); for ZeRO-3 its `estimate_zero3_model_states_mem_needs` leaves out
the 16-bit gradients, 2 N / R. Optimizer offload moves 16 N / R, the gradients' share and what lies
beside the masters, movement and masks, into the host's memory. movement.dtype bfloat16: 2 + 1/8.

LoRA: the weights stay, without gradients and moments of their own; r weights for each row and
column of a prunable matrix are trained, and the mask of all of them is on each rank too.

The teacher takes d N' bytes, d of teacher.dtype; d (N' / R + Q') under placement zero3, and those
of the host under cpu.

Left out: the libraries' own memory (a CUDA context is about 0.5 GB), DeepSpeed's buckets, pieces
that the allocator cannot use, vLLM, and the prune stage, which is rank 0's alone and holds student,
gradients and one layer's statistics beside the teacher.
"""

from dataclasses import dataclass

from pipeline.doctor.shapes import ModelShape

LAYOUTS = ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    sparsity: float
    """Movement and masks."""
    host: float
    """What offload keeps in the host's memory instead."""


def training_states(
    shape: ModelShape,
    layout: str,
    num_ranks: int,
    *,
    half: bool = False,
    offload: bool = False,
    muon: bool = False,
    movement_bytes: int = 4,
    lora_rank: int | None = None,
) -> States:
    """Memory of a student in training, on each rank.

    Args:
        shape: Of the student.
        layout: One of `LAYOUTS`.
        num_ranks: R.
        half: Whether DeepSpeed computes in a 16-bit type.
        offload: Whether ZeRO keeps the optimizer on the host.
        muon: Whether Muon trains the prunable matrices.
        movement_bytes: Of one weight's movement.
        lora_rank: Of the adapters; None trains all weights.
    """
    zero = LAYOUTS.index(layout)
    compute = 2 if half and zero else 4
    size, prunable = shape.num_weights, shape.num_prunable
    adapters = shape.matrix_widths * (lora_rank or 0)
    trained = size if lora_rank is None else adapters
    parts = num_ranks if zero else 1
    gathered = compute * shape.largest_layer if zero == 3 else 0.0
    weights = compute * (size + adapters) / (num_ranks if zero == 3 else 1) + gathered
    gradients = compute * trained / (num_ranks if zero >= 2 else 1)
    if lora_rank is None:
        gradients += gathered
    elif zero == 3:
        gradients += compute * trained / shape.num_layers
    if zero:
        optimizer = 16 * trained / parts
    else:
        optimizer = 8 * trained - (4 * prunable if muon else 0)
        gradients *= 2 if num_ranks > 1 else 1
    cut = num_ranks if lora_rank is not None else parts
    sparsity = (movement_bytes + 1 / 8) * prunable / cut
    sparsity += prunable / 8 if lora_rank is not None else 0
    host = 0.0
    if offload and zero:
        held = compute * trained / num_ranks if zero >= 2 else 0.0
        host = optimizer + held
        gradients, optimizer = gradients - held, 0.0
        if lora_rank is None:
            host, sparsity = host + sparsity, 0.0
    return States(
        weights=weights, gradients=gradients, optimizer=optimizer, sparsity=sparsity, host=host
    )


def teacher_bytes(
    shape: ModelShape, num_ranks: int, *, dtype: str, placement: str
) -> tuple[float, float]:
    """Memory of a frozen teacher on each rank: on its device, and on the host."""
    size = 2 if dtype == "bfloat16" else 4
    whole = float(size * shape.num_weights)
    if placement == "cpu":
        return 0.0, whole
    if placement == "zero3":
        return whole / num_ranks + size * shape.largest_layer, 0.0
    return whole, 0.0
