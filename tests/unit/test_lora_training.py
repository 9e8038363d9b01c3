"""LoRA students in training: movement of products, refinement, merging, resume, the reference."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, SFTConfig

from pipeline.config import Config
from pipeline.models.loading import load_tokenizer
from pipeline.models.lora import lora_config, lora_layers
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.low_rank import proposal
from pipeline.sparsity.low_rank_refine import (
    Factors,
    ProductMovement,
    product_shards,
    refine_products,
)
from pipeline.sparsity.masks import load_masks, save_masks, unpack_mask
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.storage import load_state
from pipeline.stages.training import train
from pipeline.training.checkpoint import newest_whole_checkpoint
from pipeline.training.distill_trainer import DistillTrainer
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.sparse_trainer import Sparsity
from tests.unit.hand_shards import cut_weights, masks_of
from tests.unit.tiny_models import tiny

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
MOVEMENT = MovementRule(kept="displacement", pruned="proposed", half_life_steps=5.0)
SHAPES = {"a": (6, 11), "b": (9, 4)}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def rule_of(scope="matrix", score="magnitude"):
    return RefinementRule(
        scope=scope, score=score, movement_weight=0.5, protect_steps=2, min_density=0.1
    )


# Products of hand-made factors.


def random_factors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(out, size, generator=torch.Generator().manual_seed(99)),
            torch.randn(2, size, generator=generator),
            torch.randn(out, 2, generator=generator),
            0.5,
        )
        for name, (out, size) in SHAPES.items()
    }


def tracked(factors, masks, rule=MOVEMENT):
    """Movement of products whose factors are looked up in a dict at each reading."""
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    weights = product_shards(shapes, optimizer, None, torch.device("cpu"))
    state = SparsityState.from_masks(masks, weights)
    return ProductMovement(weights, state, rule, lambda name: nullcontext(factors[name]), 0)


def random_masks():
    generator = torch.Generator().manual_seed(4)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}


def dense(factors):
    return {name: f.weight + f.scale * f.lora_b @ f.lora_a for name, f in factors.items()}


def test_movement_is_the_decayed_change_of_the_product():
    times = [dense(random_factors(seed)) for seed in (1, 2, 3)]
    factors, masks = random_factors(1), random_masks()
    movement = tracked(factors, masks)
    for step, seed in ((4, 2), (7, 3)):
        factors.update(random_factors(seed))
        effective = movement.observe(list(SHAPES), step)
        movement.step = step
    for name, mask in masks.items():
        first, second, third = (values[name] for values in times)
        decay = 0.5 ** (3 / 5.0)
        kept = decay * (second.abs() - first.abs()) + third.abs() - second.abs()
        pruned = decay * (second - first) + third - second
        expected = torch.where(mask, kept, pruned).flatten()
        assert torch.allclose(movement.state.movement[name], expected, atol=1e-5)
        assert torch.allclose(effective[name], (third * mask).flatten(), atol=1e-6)


@pytest.mark.parametrize("score", ["magnitude", "movement", "mix"])
@pytest.mark.parametrize("scope", ["matrix", "row", "model"])
def test_refinement_is_the_engines_own_on_the_effective_weights(scope, score):
    factors, masks = random_factors(1), random_masks()
    movement, twin = tracked(factors, masks), tracked(factors, masks)
    for step, seed, sparsity in ((3, 2, 0.6), (6, 3, 0.7), (9, 5, 0.75)):
        factors.update(random_factors(seed))
        twin.observe(list(SHAPES), step)
        twin.step = step
        kept = {n: m.reshape(SHAPES[n]) for n, m in masks_of(twin.state, twin.weights).items()}
        weights = cut_weights(
            {name: values * kept[name] for name, values in dense(factors).items()}
        )
        arguments = {"sparsity": sparsity, "regrow_fraction": 0.2, "step": step}
        done = refine_products(movement, rule_of(scope, score), **arguments)
        assert done == refine(twin.state, weights, rule_of(scope, score), **arguments)
        assert done.pruned
        assert done.regrown
        for name in SHAPES:
            assert torch.equal(movement.state.masks[name], twin.state.masks[name])
            assert torch.equal(movement.state.movement[name], twin.state.movement[name])


def test_a_regrown_weight_comes_back_with_its_proposal_and_a_pruned_one_keeps_its_base():
    factors, masks = random_factors(1), random_masks()
    base = {name: f.weight.clone() for name, f in factors.items()}
    movement = tracked(factors, masks)
    factors.update(random_factors(2))
    done = refine_products(movement, rule_of(), sparsity=0.5, regrow_fraction=0.3, step=1)
    assert done.regrown
    effective = movement.observe(list(SHAPES), 1)
    now = masks_of(movement.state, movement.weights)
    for name, values in dense(factors).items():
        regrown = now[name] & ~masks[name].flatten()
        assert torch.allclose(effective[name][regrown], values.flatten()[regrown], atol=1e-6)
        assert effective[name][regrown].all()
        assert not effective[name][~now[name]].any()
        assert torch.equal(factors[name].weight, base[name])


def test_movement_that_needs_gradients_is_refused():
    rule = MovementRule(half_life_steps=5.0)
    with pytest.raises(ValueError, match="set displacement and proposed"):
        tracked(random_factors(1), random_masks(), rule)


# Trainers.


def sparsity_of(tokenizer, folder, **values):
    """Start at half of the weights, chosen at random, and refine to 0.75."""
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(weight.shape, generator=generator) < 0.5
        for name, weight in prunable_weights(tiny(tokenizer, 0)).items()
    }
    folder.mkdir(exist_ok=True)
    save_masks(folder / "mask.safetensors", masks)
    schedule = RefinementSchedule(
        start_sparsity=0.5,
        final_sparsity=0.75,
        begin_step=1,
        end_step=5,
        every_steps=2,
        regrow_fraction=0.2,
    )
    arguments = {
        "source": folder,
        "schedule": schedule,
        "rule": rule_of(score="mix"),
        "movement": MOVEMENT,
        "first_step": 0,
        "stage": "distill",
    }
    return Sparsity(**(arguments | values)), masks


def student(tokenizer, masks):
    """A pruned tiny Llama."""
    model = tiny(tokenizer, 0)
    with torch.no_grad():
        for name, weight in prunable_weights(model).items():
            weight.mul_(masks[name])
    return model


def distill_trainer(tokenizer, out, model, max_steps, **arguments):
    rows = [([5, 13, 7, 15], [11, 12, 1]), ([9, 15], [8, 1])] * 16
    dataset = Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in rows],
            "labels": [[-100] * len(prompt) + completion for prompt, completion in rows],
        }
    )
    values = {
        "output_dir": str(out),
        "max_steps": max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_steps": 4,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return DistillTrainer(
        model=model,
        args=SFTConfig(**CPU, **(values | arguments)),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora_config(r=2, alpha=4.0),
        teacher=tiny(tokenizer, 1),
        kl_weight=1.0,
        ce_weight=0.5,
    )


IDS = torch.tensor([[5, 13, 7, 15, 11, 12], [9, 15, 8, 4, 3, 2]])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stage_trains_adapters_and_saves_an_ordinary_sparse_llama(
    tokenizer, tmp_path, checkpointing
):
    sparsity, masks = sparsity_of(tokenizer, tmp_path / "prune")
    model = student(tokenizer, masks)
    base = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    out = tmp_path / "distill"
    arguments = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
    trainer = distill_trainer(tokenizer, out, model, 7, **arguments)
    train(Config(), None, trainer, sparsity, out, None)

    logits = trainer.model.eval()(IDS).logits
    saved = LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    assert (saved(IDS).logits - logits).abs().max() <= 1e-6
    final = load_masks(out / "mask.safetensors")
    for name, weight in prunable_weights(saved).items():
        assert torch.equal(weight != 0, final[name]), name
        assert abs((weight == 0).float().mean() - 0.75) < 0.01
        layer = lora_layers(trainer.model)[name]
        assert torch.equal(layer.factors[0], base[name]), "the base weight is frozen"
        assert torch.equal(unpack_mask(layer.mask, weight.shape), final[name])
    assert [entry["step"] for entry in sparsity.refinements] == [1, 3, 5]
    assert sum(entry["regrown"] for entry in sparsity.refinements) > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_saved_movement_has_the_steps_since_the_last_refinement(tokenizer, tmp_path):
    sparsity, masks = sparsity_of(tokenizer, tmp_path / "prune", schedule=None)
    model = student(tokenizer, masks)
    start = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    out = tmp_path / "distill"
    trainer = distill_trainer(tokenizer, out, model, 3, save_strategy="no")
    train(Config(), None, trainer, sparsity, out, None)
    callback = trainer.sparsity
    state = load_state(out, callback.weights)
    for name, layer in callback.layers.items():
        now = proposal(*layer.factors, layer.scale)
        change = torch.where(masks[name], now.abs() - start[name].abs(), now - start[name])
        assert torch.allclose(state.movement[name], change.flatten(), atol=1e-6)
        assert change.abs().max() > 1e-3


def test_a_resumed_run_ends_bit_identical_to_the_straight_one(tokenizer, tmp_path):
    """The stop at step 4 lies between the refinements of steps 3 and 5."""
    ends = {}
    for name, stops in (("straight", (7,)), ("resumed", (4, 7))):
        for steps in stops:
            sparsity, masks = sparsity_of(tokenizer, tmp_path / "prune")
            out = tmp_path / name
            trainer = distill_trainer(tokenizer, out, student(tokenizer, masks), steps)
            assert (newest_whole_checkpoint(out) is None) == (steps == stops[0])
            train(Config(), None, trainer, sparsity, out, None)
        ends[name] = trainer.model.state_dict(), trainer.sparsity.state, sparsity.refinements
    (straight, first, log), (resumed, second, second_log) = ends["straight"], ends["resumed"]
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert log == second_log
    for name in first.masks:
        assert torch.equal(first.masks[name], second.masks[name])
        assert torch.equal(first.movement[name], second.movement[name])
    files = {path.name for path in (tmp_path / "straight" / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "lora.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files, "the base weights are those of the stage before"


def grpo_trainer(tokenizer, out, model, **options):
    return TeacherGRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **_: [float(len(c) % 2) for c in completions]],
        args=GRPOConfig(
            **CPU,
            output_dir=str(out),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=4,
            max_steps=3,
            beta=0.05,
            learning_rate=1e-1,
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["12@35=", "12@35#47="] * 8}),
        processing_class=tokenizer,
        peft_config=lora_config(r=2, alpha=4.0),
        teacher=tiny(tokenizer, 1),
        teacher_kl_weight=1.0,
        **options,
    )


def test_grpo_with_beta_takes_the_stages_first_student_for_its_reference(tokenizer, tmp_path):
    sparsity, masks = sparsity_of(tokenizer, tmp_path / "prune")
    model = student(tokenizer, masks)
    reference = model.eval()(IDS).logits.log_softmax(-1)
    trainer = grpo_trainer(tokenizer, tmp_path / "grpo", model, teacher_kl_place="loss")
    seen = []

    class Reference(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with trainer.model.disable_adapter(), torch.no_grad():
                seen.append(trainer.model(IDS).logits.log_softmax(-1))

    trainer.add_callback(Reference())
    train(Config(), None, trainer, sparsity, tmp_path / "grpo", None)
    assert trainer.ref_model is None
    assert all(torch.allclose(found, reference, atol=1e-6) for found in seen)
    assert any(entry.get("kl", 0) > 0 for entry in trainer.state.log_history)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "grpo" / "model", dtype=torch.float32)
    logits = trainer.model.eval()(IDS).logits
    assert (saved.eval()(IDS).logits - logits).abs().max() <= 1e-6


def test_the_references_log_probabilities_are_not_taken_for_the_students(tokenizer, tmp_path):
    _, masks = sparsity_of(tokenizer, tmp_path / "prune")
    model = student(tokenizer, masks)
    trainer = grpo_trainer(tokenizer, tmp_path / "grpo", model, teacher_kl_place="reward")
    batch = trainer.model, IDS, torch.ones_like(IDS), 2
    with trainer.model.disable_adapter():
        trainer._get_per_token_logps_and_entropies(*batch)
    assert trainer._old_log_probs is None
    found, _, _ = trainer._get_per_token_logps_and_entropies(*batch)
    assert trainer._old_log_probs is found
