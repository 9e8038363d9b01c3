"""TRL's GRPOTrainer with a pull towards a frozen teacher, in one of three places.

`rewards/teacher_kl.py` has the formulas and how each place meets clipping and `scale_rewards`; here
is where the log-probabilities come from:

    place       teacher                            student
    advantage   sampled tokens, when scored        of the loss, which has just computed them
    reward      sampled tokens, when rewarded      TRL's `old_per_token_logps` where it has them,
                                                   else one forward pass without gradients
    loss        its distribution, or the k         of the loss: one forward pass and one head for
                largest parts of it, when scored   log-probability, entropy and KL

The student runs a second forward pass for the reward only, and only where TRL runs none. TRL has
`old_per_token_logps` before it rewards when gradient_accumulation_steps is not a multiple of
steps_per_generation * num_iterations, and under vLLM with its importance-sampling correction; by
default it has none. The pass costs about a third of a training step's forward and backward.

For `loss` with top_k null the teacher's whole distribution waits with the batch: 4 bytes x
vocabulary for each completion token of a generation batch, at most `MAX_TARGET_BYTES`. With top_k
it is 12 k + 4 bytes a token, and no more than `MAX_LOGITS` logits of either model exist at once.

Left out: what the student's other logits say in `advantage` and `reward`; evaluation by TRL.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from pipeline.errors import UserError
from pipeline.models.chunked_head import chunked_head, score_completions
from pipeline.models.lora import adapters_disabled
from pipeline.models.teacher import completion_log_probs, completion_targets
from pipeline.training.acting_terms import ActingTerms
from pipeline.training.sampler_check import check_sampler
from pipeline.training.sparse_trainer import SparseTrainer
from pipeline.training.teacher_placement import place_teacher
from pipeline.training.two_masks import TwoMasks, fill_old_log_probs, sparsity
from rewards.teacher_kl import (
    combine,
    log_ratios,
    merge_rest,
    sequence_rewards,
    teacher_advantages,
    vocabulary_kl,
)

PLACES = ("advantage", "reward", "loss")

MAX_TARGET_BYTES = 4 * 2**30
"""Of the teacher's whole distributions over one generation batch of a rank."""


class TeacherGRPOTrainer(SparseTrainer, GRPOTrainer):
    """GRPO of a sparse student under a frozen teacher."""

    def __init__(
        self,
        *,
        args: GRPOConfig,
        reward_funcs: list[Callable],
        teacher: PreTrainedModel | None = None,
        teacher_placement: str = "device",
        teacher_kl_place: str = "advantage",
        teacher_kl_weight: float = 0.0,
        teacher_kl_clip: float = 5.0,
        teacher_kl_direction: str = "forward",
        teacher_kl_top_k: int | None = None,
        teacher_micro_batch_size: int = 64,
        num_masks: int = 1,
        sparsity_weight: float = 0.0,
        **kwargs,
    ):
        """All arguments of `GRPOTrainer`, by name, and those of the teacher and the masks.

        Args:
            args: TRL's.
            reward_funcs: TRL's; under two masks `sparsity` is appended to them, in place reward
                `teacher_kl`, and their weights to `args.reward_weights`.
            teacher: Model with the student's vocabulary; None leaves the term out.
            teacher_placement: `device`, `cpu` or `zero3`, see `teacher_placement.py`.
            teacher_kl_place: `advantage`, `reward` or `loss`.
            teacher_kl_weight: Advantage, reward or loss per nat.
            teacher_kl_clip: Bound of one token's log ratio in nats; not used in loss.
            teacher_kl_direction: In loss: `forward`, KL(teacher || student), or `reverse`.
            teacher_kl_top_k: In loss: how many of the teacher's probabilities are kept one by one;
                None keeps all.
            teacher_micro_batch_size: Sequences in one teacher forward.
            num_masks: 2 samples half of each group under the mask that comes next, see
                `two_masks.py`.
            sparsity_weight: Reward per unit of sparsity for a right completion, under two masks;
                above 0 one of `reward_funcs` is `correctness`.
            **kwargs: As in `GRPOTrainer`.

        Raises:
            UserError: The placement or the place does not go with the other settings.
        """
        assert teacher_kl_place in PLACES
        self.teacher_kl_place = None if teacher is None else teacher_kl_place
        more = []
        if num_masks == 2 and sparsity_weight > 0:
            more.append((sparsity, sparsity_weight))
        if self.teacher_kl_place == "reward":
            more.append((self.teacher_kl, teacher_kl_weight))
        for function, weight in more:
            weights = args.reward_weights or [1.0] * len(reward_funcs)
            args.reward_weights = [*weights, weight]
            reward_funcs = [*reward_funcs, function]
        super().__init__(args=args, reward_funcs=reward_funcs, **kwargs)
        self.teacher_kl_weight = teacher_kl_weight
        self.teacher_kl_clip = teacher_kl_clip
        self.teacher_kl_direction = teacher_kl_direction
        self.teacher_kl_top_k = teacher_kl_top_k
        self.teacher_micro_batch_size = teacher_micro_batch_size
        self._loss_inputs: dict | None = None
        self._old_log_probs: Tensor | None = None
        self.teacher = None
        if teacher is not None:
            self.teacher = place_teacher(teacher, teacher_placement, self.accelerator)
        if self.teacher_kl_place == "loss":
            self._student_head = chunked_head(self.accelerator.unwrap_model(self.model))
            self._check_loss_place()
        token_term = "teacher_kl" if self.teacher_kl_place == "advantage" else None
        self.acting_terms = ActingTerms(self, token_term)
        self.two_masks = TwoMasks(self) if num_masks == 2 else None

    def teacher_kl(self, prompts, completions, completion_ids, log_metric, **columns):
        """TRL reward function of place reward.

        Args:
            prompts: B prompts as texts or messages.
            completions: Not read.
            completion_ids: Their tokens, B lists.
            log_metric: TRL's.
            columns: The dataset's; not read.

        Returns:
            B rewards in nats per token, before `teacher_kl_weight`.
        """
        batch = self._padded(self._tokenize_prompts(prompts)[0], completion_ids)
        mask = batch[1][:, -batch[2] :]
        student = self._old_log_probs
        if student is None or self.mask_truncated_completions:  # TRL skips truncated ones
            student = self._student_log_probs(*batch)
        student = student[:, : batch[2]]
        teacher = completion_log_probs(self.teacher, *batch, **self._teacher_arguments())
        ratios = log_ratios(student, teacher, mask)
        log_metric("teacher_kl", (ratios.sum() / mask.sum().clamp(min=1)).item())
        return sequence_rewards(student, teacher, mask, self.teacher_kl_clip).tolist()

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        def generate(prompts):
            return super(TeacherGRPOTrainer, self)._generate_single_turn(prompts, *args, **kwargs)

        if self.two_masks is None or not self.model.training:
            return generate(prompt_ids)

        def score(prompts, completions):
            return self._student_log_probs(*self._padded(prompts, completions))

        return self.two_masks.sample(prompt_ids, generate, score), None

    def _student_log_probs(self, input_ids, attention_mask, num_completion) -> Tensor:
        """Log-probabilities (B, T) without gradient, in a forward pass of their own."""
        with torch.no_grad():
            return super()._get_per_token_logps_and_entropies(
                self.model,
                input_ids,
                attention_mask,
                num_completion,
                batch_size=self.args.per_device_train_batch_size,
            )[0]

    def _calculate_rewards(self, *args, **kwargs):
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        if self.two_masks is not None:
            self.two_masks.reward(self._rewards)
        return self._rewards

    def _generate_and_score_completions(self, inputs):
        self._old_log_probs = None
        output = super()._generate_and_score_completions(inputs)
        self._old_log_probs = None
        check_sampler(self.args, output)
        if self.model.training:
            self.acting_terms.begin(self._rewards, output["completion_mask"])
            if self.two_masks is not None:
                self.two_masks.note(output)
        batch = _sequences(output)
        if self.teacher_kl_place == "advantage":
            output["teacher_log_probs"] = completion_log_probs(
                self.teacher, *batch, **self._teacher_arguments()
            )
            output["row"] = torch.arange(len(inputs), device=self.accelerator.device)
        elif self.teacher_kl_place == "loss":
            targets, indices = completion_targets(
                self.teacher, *batch, top_k=self.teacher_kl_top_k, **self._teacher_arguments()
            )
            output["teacher_targets"] = targets
            if indices is not None:
                output["teacher_indices"] = indices
        return output

    def _compute_loss(self, model, inputs):
        self._loss_inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
            if self.teacher_kl_place == "loss":
                loss = loss + self.teacher_kl_weight * self._mean_kl()
            return loss
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, **kwargs
    ):
        inputs = self._loss_inputs
        if inputs is not None and self.teacher_kl_place == "loss":
            scores = self._scores_with_kl(model, input_ids, attention_mask, logits_to_keep)
        else:
            scores = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **kwargs
            )
        if inputs is None:
            if model is self.model and not adapters_disabled(model):
                self._old_log_probs = scores[0]  # and not those of the reference
            return scores
        fill_old_log_probs(inputs, scores[0].detach())
        if self.teacher_kl_place == "advantage":
            self._add_teacher_advantages(scores[0].detach())
        return scores

    def _add_teacher_advantages(self, student_log_probs: Tensor) -> None:
        """Replaces the advantages (B,) by (B, T), before the present loss reads them."""
        inputs = self._loss_inputs
        batch = student_log_probs, inputs["teacher_log_probs"], inputs["completion_mask"]
        term = teacher_advantages(*batch, weight=self.teacher_kl_weight, clip=self.teacher_kl_clip)
        inputs["advantages"] = combine(inputs["advantages"], term)
        if self.model.training:
            self.acting_terms.add(inputs["row"], term)
        self._log_teacher_kl(log_ratios(*batch))

    def _scores_with_kl(self, model, input_ids, attention_mask, num_completion):
        """Log-probability, entropy and KL of each completion token, from one head."""
        inputs = self._loss_inputs
        present = inputs["completion_mask"].bool()
        tokens = inputs["completion_ids"][present]
        targets = inputs["teacher_targets"][present]
        indices = inputs["teacher_indices"][present] if "teacher_indices" in inputs else None

        def score(logits: Tensor, chosen: slice) -> Tensor:
            log_probs = (logits / self.temperature).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            sampled = log_probs.gather(-1, tokens[chosen].unsqueeze(-1)).squeeze(-1)
            merged = log_probs if indices is None else merge_rest(log_probs, indices[chosen])
            kl = vocabulary_kl(merged, targets[chosen], self.teacher_kl_direction)
            return torch.stack([sampled, entropy, kl], -1)

        with self.accelerator.autocast():
            scores = score_completions(
                model, self._student_head, input_ids, attention_mask, num_completion, score
            )
        log_probs, entropies, kl = scores.unbind(-1)
        inputs["vocabulary_kl"] = kl
        self._log_teacher_kl(kl.detach())
        return log_probs, entropies, None

    def _mean_kl(self) -> Tensor:
        """This micro-batch's part of the mean over all completion tokens of the optimizer step.

        TRL counts the tokens of the generation batch over all ranks, over which gradients are then
        averaged.
        """
        num_tokens = self._loss_inputs["num_items_in_batch"].clamp(min=1)
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return (
            self._loss_inputs["vocabulary_kl"].sum()
            * self.accelerator.num_processes
            / (num_tokens * share)
        )

    def _log_teacher_kl(self, nats: Tensor) -> None:
        """Notes the mean over completion tokens of all ranks; `nats` (B, T) is 0 at padding."""
        num_tokens = self._loss_inputs["completion_mask"].sum().to(nats)
        total = self.accelerator.reduce(torch.stack([nats.sum(), num_tokens]), reduction="sum")
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["teacher_kl"].append((total[0] / total[1].clamp(min=1)).item())

    def _teacher_arguments(self) -> dict:
        return {
            "micro_batch_size": self.teacher_micro_batch_size,
            "temperature": self.temperature,
        }

    def _padded(self, prompt_ids: list, completion_ids: list) -> tuple[Tensor, Tensor, int]:
        """Token ids and attention mask (B, P + T), prompts to the left, completions right; T."""
        num_prompt = max(len(ids) for ids in prompt_ids)
        num_completion = max(len(ids) for ids in completion_ids)
        size = len(prompt_ids), num_prompt + num_completion
        ids, mask = torch.full(size, self._tokenizer.pad_token_id), torch.zeros(size).long()
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            text = slice(num_prompt - len(prompt), num_prompt + len(completion))
            ids[row, text] = torch.tensor([*prompt, *completion])
            mask[row, text] = 1
        device = self.accelerator.device
        return ids.to(device), mask.to(device), num_completion

    def _check_loss_place(self) -> None:
        """Refuses what the chunked head does not do, and targets that fill the memory."""
        if self.args.cast_lm_head_to_fp32:
            raise UserError(
                "grpo.cast_lm_head_to_fp32: true: under rewards.teacher_kl_place loss the head "
                "computes in the type of grpo.bf16 and sums in fp32; set false instead"
            )
        vocab_size = self._student_head.out_features
        num_tokens = self.args.per_device_train_batch_size * self.args.steps_per_generation
        num_tokens *= self.max_completion_length
        if self.teacher_kl_top_k is None and num_tokens * vocab_size * 4 > MAX_TARGET_BYTES:
            raise UserError(
                "rewards.teacher_kl_top_k: null: the teacher's probabilities over a generation "
                f"batch, {num_tokens} tokens x {vocab_size} entries, would take "
                f"{num_tokens * vocab_size * 4 / 2**30:.0f} GiB on each rank; set 64 instead"
            )


def _sequences(output: dict) -> tuple[Tensor, Tensor, int]:
    """Token ids and attention mask (B, P + T) of a batch of TRL's, and T."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    return ids, mask, output["completion_ids"].size(1)
