"""A CPU runtime: matrices above a break-even sparsity as CSR products, the rest dense.

At decode a linear layer costs what it reads: a dense weight 4 bytes in fp32 and 2 in bf16, a kept
CSR weight 8 (an fp32 value, an int32 column). Bytes alone would break even at a sparsity of 0.5 and
of 0.75; what torch's products reach is measured by the inference suite.

One token is a matrix-vector product, more are a product with the transposed inputs, whose result is
copied back: handed on as a transposed view, it slows down every dense product that follows. Values
and sums are fp32 whatever the model's dtype, since torch has no other CSR product on CPUs.

On disk it is `packed.py`'s file, the smallest there is. Left out: loading without ever holding a
dense matrix, a dense product for long prompts.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.export import packed
from pipeline.models.prunable import decoder_layers, measured_sparsity, prunable_modules

BREAK_EVEN_SPARSITY = {torch.float32: 0.55, torch.bfloat16: 0.8}
"""From here on the CSR product is faster than the dense one of the dtype, for one token and for
eight (`launch/benchmark.py --suite inference`, RESULTS.md)."""


class CsrLinear(nn.Module):
    """A linear layer whose weight is an fp32 CSR matrix with int32 indices."""

    def __init__(self, module: nn.Linear):
        """Takes weight and bias of a dense layer on the CPU."""
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self.bias = module.bias
        self.dtype = module.weight.dtype
        # Not a buffer: a model that is cast keeps it in fp32.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            weight = module.weight.detach().float().to_sparse_csr()
            self.weight = torch.sparse_csr_tensor(
                weight.crow_indices().int(),
                weight.col_indices().int(),
                weight.values(),
                weight.shape,
                check_invariants=False,
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (..., in) to outputs (..., out) of the same dtype."""
        rows = inputs.reshape(-1, self.in_features).float()
        if len(rows) == 1:
            outputs = torch.mv(self.weight, rows[0])
        else:
            outputs = torch.mm(self.weight, rows.t().contiguous()).t().contiguous()
        outputs = outputs.view(*inputs.shape[:-1], self.out_features).to(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias

    def dense_weight(self) -> Tensor:
        """(out, in), in the dtype of the layer it was made from."""
        return self.weight.to_dense().to(self.dtype)


def prepare(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model itself, if any of its matrices would become CSR.

    Raises:
        UserError: None would, or torch has no CSR product here.
    """
    if not torch.backends.mkl.is_available():
        raise UserError(
            "export.formats: csr: this build of torch has no MKL, whose CSR products it needs; set "
            "packed instead"
        )
    sparsities = measured_sparsity(model)[1].values()
    break_even = BREAK_EVEN_SPARSITY[model.dtype]
    if max(sparsities) < break_even:
        raise UserError(
            f"export.formats: csr: no matrix is sparser than {max(sparsities):.3f}, and below "
            f"{break_even} dense products in {str(model.dtype).removeprefix('torch.')} are faster; "
            "set a higher prune.sparsity, or leave csr out"
        )
    return model


def load(folder: str | Path) -> LlamaForCausalLM:
    """The model that was saved, its sparse matrices as CSR, in evaluation mode on the CPU.

    Raises:
        UserError: As `packed.load`.
    """
    return to_csr(packed.load(folder))


@torch.no_grad()
def to_csr(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Puts a `CsrLinear` in the place of every matrix that is sparse enough; returns the model."""
    break_even = BREAK_EVEN_SPARSITY[model.dtype]
    for layer in decoder_layers(model):
        for name, module in prunable_modules(layer).items():
            zeros = int((module.weight == 0).sum())
            if zeros >= break_even * module.weight.numel():
                layer.set_submodule(name, CsrLinear(module))
    return model
