"""LoRA under a mask: outputs and gradients of a dense masked sum, and what is kept and merged."""

import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from pipeline.models.loading import load_tokenizer
from pipeline.models.lora import (
    MaskedLoraLinear,
    adapters_disabled,
    lora_config,
    lora_layers,
    merged_state_dict,
)
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.low_rank import MaskedLowRankLinear, effective_weight
from pipeline.sparsity.masks import pack_mask, unpack_mask
from tests.unit.tiny_models import tiny

OUT, IN, RANK, SCALE = 7, 13, 3, 0.5


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def example(dtype=torch.float64, kept=0.4, bias=True):
    """Input, factors, mask and bias; row 2 of the mask is all zeros."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(OUT, IN, generator=generator) < kept
    mask[2] = False
    hidden, weight = randn(2, 5, IN), randn(OUT, IN)
    lora_a, lora_b = randn(RANK, IN), randn(OUT, RANK)
    for tensor in (hidden, lora_a, lora_b):
        tensor.requires_grad_()
    return hidden, weight, lora_a, lora_b, mask, randn(OUT) if bias else None


def dense_sum(hidden, weight, lora_a, lora_b, mask, bias):
    """The textbook version: autograd through the masked sum."""
    return F.linear(hidden, (weight + SCALE * (lora_b @ lora_a)) * mask, bias)


def ours(hidden, weight, lora_a, lora_b, mask, bias):
    packed = pack_mask(mask)
    return MaskedLowRankLinear.apply(hidden, weight, lora_a, lora_b, packed, SCALE, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_outputs_and_gradients_are_those_of_the_dense_masked_sum(dtype, tolerance, kept, bias):
    found, expected = [], []
    for function, results in ((ours, found), (dense_sum, expected)):
        values = example(dtype, kept, bias)
        output = function(*values)
        output.square().sum().backward()
        results += [output.detach(), *(values[i].grad for i in (0, 2, 3))]
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - reference).norm() <= tolerance * (1 + reference.norm())
    assert not found[0][..., 2].any() or bias, "a row without weights gives its bias alone"


def test_numerical_gradients():
    hidden, weight, lora_a, lora_b, mask, bias = example()
    assert torch.autograd.gradcheck(
        lambda *inputs: ours(inputs[0], weight, *inputs[1:], mask, bias), (hidden, lora_a, lora_b)
    )


def test_autograd_keeps_the_input_and_the_factors_and_no_product():
    values = example(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(*values)
    allowed = {values[i].data_ptr() for i in (0, 1, 2, 3)}
    own = [tensor for tensor in kept if tensor.data_ptr() not in allowed]
    assert [tensor.numel() for tensor in own] == [-(-OUT * IN // 8)], "the packed mask alone"
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dense_sum(*values)
    dense = [t for t in kept if t.numel() == OUT * IN and t.data_ptr() not in allowed]
    assert dense, "the textbook version does keep matrices of the weight's size"


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors made inside that were alive at once; `known` were there before."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("autocast", "bytes_stated"), [(False, 5.5), (True, 6.0)])
def test_the_product_of_one_layer_at_a_time_is_in_memory(autocast, bytes_stated):
    """Of four layers in a row, forwards and backwards; the rest is 2 % of it."""
    size, depth = 1024, 4
    hidden = torch.randn(1, size)
    factors = [torch.randn(size, size), torch.randn(2, size), torch.randn(size, 2)]
    for factor in factors[1:]:
        factor.requires_grad_()
    packed = pack_mask(torch.rand(size, size) < 0.5)
    with (
        LiveBytes([hidden, packed, *factors]) as live,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        for _ in range(depth):
            hidden = MaskedLowRankLinear.apply(hidden, *factors, packed, SCALE, None)
        hidden.float().sum().backward()
    assert 4 * size * size < live.most <= 1.02 * bytes_stated * size * size


def test_under_autocast_the_effective_weight_is_rounded_once():
    hidden, weight, lora_a, lora_b, mask, bias = example(torch.float32)
    effective = effective_weight(weight, lora_a, lora_b, SCALE, pack_mask(mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(hidden, weight, lora_a, lora_b, mask, bias)
        expected = F.linear(hidden, effective, bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    reference = example(torch.float32)
    dense_sum(*reference).square().sum().backward()
    for mine, exact in ((lora_a, reference[2]), (lora_b, reference[3]), (hidden, reference[0])):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    gradients = []
    for wrapped in (False, True):
        values = example()
        output = checkpoint(ours, *values, use_reentrant=reentrant) if wrapped else ours(*values)
        output.square().sum().backward()
        gradients.append([values[i].grad for i in (0, 2, 3)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nan_in_a_pruned_weight_stays_there():
    hidden, weight, lora_a, lora_b, mask, bias = example()
    weight[~mask] = torch.nan
    ours(hidden, weight, lora_a, lora_b, mask, bias).sum().backward()
    assert torch.isfinite(lora_a.grad).all()


def adapted(tokenizer, seed=0):
    """A tiny Llama with grouped queries, adapters that do something, and a random mask on each."""
    model = get_peft_model(tiny(tokenizer, seed), lora_config(r=3, alpha=6.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            weight, _, lora_b = layer.factors
            lora_b.copy_(torch.randn(lora_b.shape, generator=generator) * 0.1)
            layer.mask = pack_mask(torch.rand(weight.shape, generator=generator) < 0.5)
    return model.eval()


IDS = torch.tensor([[5, 13, 7, 15, 11, 12], [9, 15, 8, 4, 3, 2]])


def test_every_prunable_projection_has_an_adapter_and_nothing_else_trains(tokenizer):
    plain = tiny(tokenizer, 0)
    shapes = {name: weight.shape for name, weight in prunable_weights(plain).items()}
    model = get_peft_model(plain, lora_config(r=3, alpha=6.0))
    layers = lora_layers(model)
    assert {name: layer.factors[0].shape for name, layer in layers.items()} == shapes
    assert len({tuple(shape) for shape in shapes.values()}) > 2, "grouped queries: k, v are smaller"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers)
    assert all(".lora_" in name for name in trained)
    assert lora_layers(tiny(tokenizer, 0)) == {}


def test_a_fresh_adapter_changes_nothing(tokenizer):
    before = tiny(tokenizer, 0)(IDS).logits
    model = get_peft_model(tiny(tokenizer, 0), lora_config(r=3, alpha=6.0)).eval()
    assert torch.allclose(model(IDS).logits, before, atol=1e-6)


def test_the_merged_model_is_an_ordinary_llama_with_the_zeros_and_logits_of_the_trained_one(
    tokenizer, tmp_path
):
    model = adapted(tokenizer)
    logits = model(IDS).logits
    merged = merged_state_dict(model, model.state_dict())
    model.get_base_model().save_pretrained(tmp_path, state_dict=merged)
    student = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert all(type(m) is nn.Linear for m in student.modules() if isinstance(m, nn.Linear))
    assert not any(isinstance(m, MaskedLoraLinear) for m in student.modules())
    weights = prunable_weights(student)
    for name, layer in lora_layers(model).items():
        mask = unpack_mask(layer.mask, weights[name].shape)
        assert torch.equal(weights[name] != 0, mask), name
        assert not torch.signbit(weights[name][~mask]).any(), "plus zero"
    assert (student(IDS).logits - logits).abs().max() <= 1e-6
    assert (tiny(tokenizer, 0)(IDS).logits - logits).abs().max() > 1e-2, "the adapters do something"


def test_with_adapters_disabled_it_is_the_student_the_stage_began_with(tokenizer):
    model = adapted(tokenizer)
    assert not adapters_disabled(model)
    with model.disable_adapter():
        assert adapters_disabled(model)
        logits = model(IDS).logits
    assert torch.equal(logits, tiny(tokenizer, 0)(IDS).logits)


def test_a_second_adapter_has_no_mask(tokenizer):
    model = adapted(tokenizer)
    model.add_adapter("second", lora_config(r=3, alpha=6.0))
    model.set_adapter("second")
    with pytest.raises(AssertionError, match="no mask"):
        model(IDS)


def test_pefts_own_merge_is_refused(tokenizer):
    with pytest.raises(NotImplementedError, match="merged_state_dict"):
        adapted(tokenizer).merge_adapter()
