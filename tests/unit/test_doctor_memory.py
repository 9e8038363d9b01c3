"""The doctor's arithmetic against bytes that were counted, and against DeepSpeed's own."""

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.doctor import activations
from pipeline.doctor.activations import (
    Pass,
    activation_bytes,
    layer_bytes,
    logit_bytes,
    sampling_bytes,
    teacher_pass_bytes,
)
from pipeline.doctor.memory import teacher_bytes, training_states
from pipeline.doctor.shapes import meta_model, shape_of
from pipeline.models.chunked_head import MAX_LOGITS, chunked_head
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.shards import plain_shards
from pipeline.sparsity.state import SparsityState
from pipeline.training.distill_trainer import completion_losses

LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
WORK = Pass(
    sequences=4, sampled=8, prompt=24, completion=40, checkpointing=False, beside_teacher=False
)


def small(num_layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )


def shape(config=LLAMA_1B):
    return shape_of(meta_model(config))


def test_published_sizes_are_counted_without_weights():
    one, eight = shape(LLAMA_1B), shape(LLAMA_8B)
    assert (one.num_weights, one.num_prunable) == (1_235_814_400, 973_078_528)
    assert (eight.num_weights, eight.num_prunable) == (8_030_261_248, 6_979_321_856)
    assert one.largest_layer == 128256 * 2048  # the embedding is larger than a layer
    assert (eight.attention, eight.key_value) == (4096, 1024)


def bytes_saved(model, precision):
    """Bytes of distinct tensors that autograd keeps of one forward pass, parameters left out."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(WORK.sequences * WORK.length).reshape(WORK.sequences, -1) % 300
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_activations_are_what_autograd_keeps(precision):
    models = {layers: small(layers) for layers in (1, 3)}
    if precision == "bf16":
        models = {layers: model.bfloat16() for layers, model in models.items()}
    saved = {layers: bytes_saved(model, precision) for layers, model in models.items()}
    measured = (saved[3] - saved[1]) / 2  # of one layer
    if precision == "autocast":  # its copy of the weights is counted apart
        layer = models[1].model.layers[0]
        measured -= 2 * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
    tokens = WORK.sequences * WORK.length
    estimate = tokens * layer_bytes(shape_of(models[1]), WORK.length, precision)
    assert estimate == pytest.approx(measured, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    model = shape(LLAMA_1B)
    kept = activation_bytes(model, replace(WORK, checkpointing=True), "fp32")
    whole = activation_bytes(model, WORK, "fp32")
    tokens = WORK.sequences * WORK.length
    assert kept == tokens * 4 * 2048 * 16 + whole / 16


def test_states_of_one_process_are_what_training_holds():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = plain_shards(prunable_weights(model), optimizer)
    masks = {name: torch.ones(dims, dtype=torch.bool) for name, dims in weights.shapes.items()}
    state = SparsityState.from_masks(masks, weights)
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    estimate = training_states(shape_of(model), "plain", 1)
    assert estimate.weights == sum(p.nbytes for p in model.parameters())
    assert estimate.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert estimate.optimizer == sum(t.nbytes for t in moments)
    held = [*state.masks.values(), *state.movement.values()]
    assert estimate.sparsity == sum(t.nbytes for t in held)
    assert estimate.host == 0


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_zero_in_bf16_is_deepspeeds_own_arithmetic(num_ranks):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    model = shape(LLAMA_8B)
    size = model.num_weights

    def device(layout, offload):
        states = training_states(model, layout, num_ranks, half=True, offload=offload)
        return states.weights + states.gradients + states.optimizer

    assert device("ZeRO-2", False) == pytest.approx(zero2(size, num_ranks, cpu_offload=False)[1])
    assert device("ZeRO-2", True) == pytest.approx(zero2(size, num_ranks, cpu_offload=True)[1])
    layer = model.largest_layer
    theirs = zero3(size, layer, num_ranks, cpu_offload=False, cpu_offload_params=False)[1]
    assert device("ZeRO-3", False) == pytest.approx(theirs + 2 * size / num_ranks)
    theirs = zero3(size, layer, num_ranks, cpu_offload=True, cpu_offload_params=False)[1]
    assert device("ZeRO-3", True) == pytest.approx(theirs)


def test_each_option_changes_the_part_it_belongs_to():
    model = shape(LLAMA_1B)
    size, prunable = model.num_weights, model.num_prunable
    plain = training_states(model, "plain", 1)
    assert training_states(model, "plain", 2).gradients == 2 * plain.gradients  # DDP's buckets
    assert plain.optimizer - training_states(model, "plain", 1, muon=True).optimizer == 4 * prunable
    small = training_states(model, "plain", 1, movement_bytes=2)
    assert plain.sparsity - small.sparsity == 2 * prunable
    offloaded = training_states(model, "ZeRO-3", 4, half=True, offload=True)
    assert offloaded.sparsity == offloaded.optimizer == 0
    assert offloaded.host == 18 * size / 4 + 4.125 * prunable / 4
    lora = training_states(model, "plain", 1, lora_rank=16)
    adapters = lora.weights / 4 - size
    assert adapters == 16 * model.matrix_widths == lora.gradients / 4 == lora.optimizer / 8


def test_teacher_by_placement():
    size = 8_030_261_248
    model = shape(LLAMA_8B)
    assert teacher_bytes(model, 4, dtype="bfloat16", placement="device") == (2 * size, 0)
    assert teacher_bytes(model, 4, dtype="float32", placement="cpu") == (0, 4 * size)
    on_device, on_host = teacher_bytes(model, 4, dtype="bfloat16", placement="zero3")
    assert (on_device, on_host) == (2 * size / 4 + 2 * model.largest_layer, 0)


@pytest.mark.parametrize("chunk", [32, 128])
def test_pieces_of_logits_are_what_distillation_holds(chunk, monkeypatch):
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    work = replace(WORK, sequences=2, prompt=16, completion=48, beside_teacher=True)
    ids = torch.arange(2 * 64).reshape(2, 64)
    labels = ids.masked_fill(torch.arange(64) < 16, -100)
    head = chunked_head(model)
    monkeypatch.setattr(head, "max_logits", chunk * 32000)
    monkeypatch.setattr(activations, "MAX_LOGITS", chunk * 32000)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        losses = completion_losses(model, head, teacher, ids, torch.ones_like(ids), labels)
        losses.sum().backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    held = 3 * sum(weight.nbytes for weight in model.parameters())  # gradients, and the teacher
    shape = shape_of(model)
    estimate = logit_bytes(shape, work) + activation_bytes(shape, work, "fp32")
    assert estimate == pytest.approx(peak["Total"] - held, rel=0.06)


def test_logits_and_sampling():
    model = shape(LLAMA_1B)
    assert logit_bytes(model, replace(WORK, sequences=64)) == 20 * MAX_LOGITS
    distil = replace(WORK, beside_teacher=True)
    assert logit_bytes(model, distil) == 4 * 7 * 160 * 128256
    assert teacher_pass_bytes(model, 4, WORK) - teacher_pass_bytes(model, 4, distil) == (
        4 * 4 * 160 * 128256
    )
    assert sampling_bytes(model, WORK, "fp32") == 8 * 64 * 64 * 1024  # 64 KiB a token
