"""Bytes of one rank that live during one pass: activations, the head's logits, sampling.

Activations. Llama's layer keeps for its backward pass, for each token, of hidden size H, attention
width A, MLP width F, in sequences of S tokens:

    fp32                        4 (6 H + 4 A + 4 F) + 4 S
    bf16 autocast of fp32       26 H + 8 A + 8 F + 2 S
    bf16 weights (DeepSpeed)    16 H + 8 A + 8 F + 2 S

counted in transformers' modeling_llama.py: two norms keep their input and its normalised copy
(autocast turns their output to bf16 anew for each of five linears), attention keeps q, k and v
(repeated to all heads), its output and its mask, the MLP four tensors. Without S that is the
layer of Korthikanti et al. 2022 (arXiv 2205.05198, section 4) with SwiGLU in the place of GELU and
without attention's S x S scores, which fused kernels do not keep. For a tiny Llama the formula is
within 1 % of the bytes that autograd saves (tests/unit/test_doctor_memory.py). With gradient
checkpointing each layer keeps its input alone, and one layer is computed again at a time.

Logits. Tokens are projected in pieces, never all at once; a piece is at most
`chunked_head.MAX_LOGITS` fp32 values. With gradients five of them live at once; in distill, where
the teacher's are made beside the student's, seven, which the same test finds within 6 % of the peak
it measures.

Sampling. Keys and values of every sequence that is sampled at once: 2 K values for each token and
layer, fp32, or bf16 under DeepSpeed with bf16.

Left out: gradients of activations (a layer's at a time), the optimizer's temporaries.
"""

from dataclasses import dataclass

from pipeline.doctor.shapes import ModelShape
from pipeline.models.chunked_head import MAX_LOGITS


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What goes through the student at once on one rank."""

    sequences: int
    """In one backward pass."""
    sampled: int
    """Sampled at once; 0 where the stage samples nothing."""
    prompt: int
    """Tokens of the longest prompt."""
    completion: int
    """Tokens of the longest completion."""
    checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    beside_teacher: bool
    """Whether the teacher's logits are made beside the student's, as in distill."""

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.completion


def layer_bytes(shape: ModelShape, length: int, precision: str) -> int:
    """Bytes that one decoder layer keeps for each token.

    Args:
        shape: Of the model.
        length: S.
        precision: `fp32`, `autocast` (bf16 from fp32 weights) or `bf16` (weights too).
    """
    hidden, attention, mlp = shape.hidden, shape.attention, shape.mlp
    if precision == "fp32":
        return 4 * (6 * hidden + 4 * attention + 4 * mlp) + 4 * length
    return (26 if precision == "autocast" else 16) * hidden + 8 * attention + 8 * mlp + 2 * length


def activation_bytes(shape: ModelShape, work: Pass, precision: str) -> float:
    """Activations of one forward pass, until its backward pass frees them."""
    tokens = work.sequences * work.length
    one_layer = layer_bytes(shape, work.length, precision)
    if not work.checkpointing:
        return tokens * one_layer * shape.num_layers
    layer_input = (2 if precision == "bf16" else 4) * shape.hidden
    return tokens * (layer_input * shape.num_layers + one_layer)


def logit_bytes(shape: ModelShape, work: Pass) -> float:
    """Logits and what the loss makes of them."""
    scored = work.sequences * work.completion
    pieces = 7 if work.beside_teacher else 5
    return pieces * 4 * min(MAX_LOGITS, scored * shape.vocabulary)


def sampling_bytes(shape: ModelShape, work: Pass, precision: str) -> float:
    """Keys and values of the sequences that are sampled at once."""
    size = 2 if precision == "bf16" else 4
    return size * work.sampled * work.length * 2 * shape.key_value * shape.num_layers


def teacher_pass_bytes(shape: ModelShape, sequences: int, work: Pass) -> float:
    """A teacher's forward pass without gradients: four pieces of logits, one layer's activations.

    Args:
        shape: Of the teacher.
        sequences: At once, `teacher.micro_batch_size`.
        work: Of the stage; logits that are made beside the student's are counted there.
    """
    sequences = min(sequences, work.sampled or work.sequences)
    layer = sequences * work.length * layer_bytes(shape, work.length, "fp32")
    if work.beside_teacher:
        return layer
    return layer + 4 * 4 * min(MAX_LOGITS, sequences * work.completion * shape.vocabulary)
