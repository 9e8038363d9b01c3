"""A GRPO trainer whose completions were recorded; all that follows sampling is the real thing."""

import torch
from datasets import Dataset
from trl import GRPOConfig

from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from tests.unit.tiny_models import tiny

END = 1
CLIP = 2.0
COMPLETIONS = {  # per prompt four of different lengths; the very last is cut off
    "12@35=": [[11, 12, END], [8, END], [30, 22, END], [END]],
    "12@35#47=": [[9, 40, END], [12, 13, 5, END], [20, END], [8, 8, 41, 17]],
}
PROMPTS = list(COMPLETIONS)


def starts_even(completion_ids, **columns):
    """Reward: 1 where the first token is even."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


class RecordedTrainer(TeacherGRPOTrainer):
    """Answers each prompt with its recorded completions, in order."""

    def _generate_single_turn(self, prompt_ids, images, fields, num_generations, **options):
        first = self.accelerator.process_index * len(prompt_ids)
        known = {tuple(self.processing_class(p)["input_ids"]): c for p, c in COMPLETIONS.items()}
        completions = [
            known[tuple(ids)][(first + row) % num_generations] for row, ids in enumerate(prompt_ids)
        ]
        return completions, None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.last_scores = scores
        if scores[0].requires_grad:
            scores[0].retain_grad()
        return scores

    def acting_advantages(self, batch):
        """What each token's advantage comes to in the gradient (B, T), ratio and clipping in it."""
        self.current_gradient_accumulation_steps = 1
        self._compute_loss(self.model, batch).backward()
        return -self.last_scores[0].grad * batch["num_items_in_batch"]


def recorded_trainer(tokenizer, folder, *, teacher, options=None, model=None, **arguments):
    """A `RecordedTrainer` of a tiny student, in training mode.

    `options` are those of `TeacherGRPOTrainer`, `arguments` those of `GRPOConfig`.
    """
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        "beta": 0.0,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    options = {"reward_funcs": [starts_even], **(options or {})}
    trainer = RecordedTrainer(
        model=tiny(tokenizer, 0) if model is None else model,
        args=GRPOConfig(output_dir=str(folder), **(values | arguments)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=tokenizer,
        teacher=teacher,
        **options,
    )
    trainer.model.train()
    return trainer


def trainer_with_teacher(
    tokenizer, folder, place, weight=0.3, *, teacher_seed=1, options=None, **arguments
):
    """A `recorded_trainer` by the place of its term; the teacher has other weights."""
    chosen = {"teacher_kl_place": place, "teacher_kl_weight": weight, "teacher_kl_clip": CLIP}
    return recorded_trainer(
        tokenizer,
        folder,
        teacher=tiny(tokenizer, teacher_seed),
        options=chosen | (options or {}),
        **arguments,
    )


def gradients(trainer):
    """Name to gradient."""
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def count_forwards(model, function):
    """How often `function` runs the model's decoder, and what it returns."""
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    result = function()
    handle.remove()
    return len(calls), result


def score(trainer, num_generations=4):
    """TRL's batch for both prompts: (B, T) tensors, rewards turned into advantages."""
    rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(num_generations)]
    return trainer._generate_and_score_completions(rows)


def log_probs_by_hand(model, tokenizer, num_generations=4):
    """Log p(token | prompt and earlier tokens) of every recorded token, one forward each."""
    found = []
    for prompt in PROMPTS:
        for completion in COMPLETIONS[prompt][:num_generations]:
            ids, row = tokenizer(prompt)["input_ids"], []
            for token in completion:
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1]
                row.append(logits.log_softmax(-1)[token].item())
                ids = [*ids, token]
            found.append(row)
    return found


def log_ratios_by_hand(tokenizer):
    """Log p_s - log p_t of each recorded token under weights 0 and 1, eight lists."""
    student, teacher = (log_probs_by_hand(tiny(tokenizer, seed), tokenizer) for seed in (0, 1))
    rows = zip(student, teacher, strict=True)
    return [[a - b for a, b in zip(*row, strict=True)] for row in rows]


def clipped(values):
    """Log ratios as the term sees them."""
    return [max(-CLIP, min(CLIP, value)) for value in values]
