"""What the model in training says to prompts set aside, asked on all ranks and without a trace.

    accuracy        fraction of prompts whose one greedy answer is right
    log-probability mean of log p(token | prompt, tokens before) over a given completion, in nats

Each of R ranks answers every R-th prompt; a prompt's result is a number that one rank has and all
others leave 0, so the sum over ranks is exact and the same on all of them. Under ZeRO-3 each
forward pass needs every rank, so all have equally many prompts (the last one may be asked again,
which is not counted), cut into equally many batches. Weights are gathered as TRL gathers them to
generate, `ds3_gather_for_generation` included.

No trace: random states of Python, numpy and torch, training mode of each module, gradient
checkpointing and generation config are afterwards what they were, so a run in which the model was
asked goes on as one in which it was not.

Cost, for n prompts with answers of T tokens: n T tokens one at a time for the answers, and one
forward pass over n sequences for the log-probabilities, divided by R.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from trl.models import unwrap_model_for_generation

from pipeline.models.chunked_head import chunked_head
from pipeline.models.teacher import completion_log_probs
from pipeline.rollouts import generate


@dataclass(frozen=True)
class ProbePrompt:
    """A prompt to ask, and how its answer is judged."""

    prompt_ids: list[int]
    answer: str
    """The reference that the verifier compares with."""
    completion_ids: list[int] | None = None
    """A right completion, the end token included, whose log-probability is taken."""


class Probe:
    """Asks a trainer's model the same prompts as often as one likes."""

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[ProbePrompt],
        verifier: Callable[[str, str], float],
        *,
        max_new_tokens: int,
        batch_size: int,
    ):
        """To be made before training begins: DeepSpeed must find the head that it then keeps.

        Args:
            trainer: Any TRL trainer of a causal language model.
            prompts: The same on every rank, at least one.
            verifier: (completion, answer) to a score; 1 or more is right.
            max_new_tokens: Longest answer, in tokens.
            batch_size: Prompts in one forward pass of a rank.
        """
        assert prompts
        self.trainer = trainer
        self.prompts = list(prompts)
        self.verifier = verifier
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.has_completion = torch.tensor([p.completion_ids is not None for p in self.prompts])
        """Bool (n,): which prompts have a log-probability."""
        if self.has_completion.any():
            chunked_head(trainer.accelerator.unwrap_model(trainer.model))

    def accuracy(self) -> float:
        """Fraction of prompts whose greedy answer is right, in [0, 1]. Every rank calls it."""
        return self.correct().double().mean().item()

    def correct(self) -> Tensor:
        """Bool (n,) on the CPU: whether each greedy answer is right. Every rank calls it."""
        mine, num_counted = self._my_part(range(len(self.prompts)))
        tokenizer = self.trainer.processing_class
        with self._asking() as model:
            completions = generate(
                model,
                tokenizer,
                [self.prompts[index].prompt_ids for index in mine],
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            right = [
                float(self.verifier(text, self.prompts[index].answer) >= 1)
                for index, text in zip(mine, texts, strict=True)
            ]
        return self._share(mine[:num_counted], torch.tensor(right)).bool()

    def log_probs(self) -> Tensor:
        """fp32 (n,) on the CPU: nats per token of each completion; 0 where a prompt has none.

        Every rank calls it.
        """
        asked = self.has_completion.nonzero().squeeze(1).tolist()
        if not asked:
            return torch.zeros(len(self.prompts))
        mine, num_counted = self._my_part(asked)
        ids, mask, num_completion = self._padded(mine)
        with self._asking() as model:
            nats = completion_log_probs(
                model, ids, mask, num_completion, micro_batch_size=self.batch_size
            )
        means = nats.sum(1) / mask[:, -num_completion:].sum(1)
        return self._share(mine[:num_counted], means)

    def _my_part(self, indices: Sequence[int]) -> tuple[list[int], int]:
        """This rank's prompts, equally many on each rank, and how many of them count."""
        accelerator = self.trainer.accelerator
        world_size, rank = accelerator.num_processes, accelerator.process_index
        num_each = -(-len(indices) // world_size)
        places = range(rank, num_each * world_size, world_size)
        mine = [indices[place % len(indices)] for place in places]
        return mine, sum(place < len(indices) for place in places)

    def _share(self, mine: list[int], values: Tensor) -> Tensor:
        """fp32 (n,): every rank's first values at the places `mine`, on every rank."""
        accelerator = self.trainer.accelerator
        placed = torch.zeros(len(self.prompts))
        placed[mine] = values[: len(mine)].float().cpu()
        return accelerator.reduce(placed.to(accelerator.device), reduction="sum").cpu()

    def _padded(self, indices: list[int]) -> tuple[Tensor, Tensor, int]:
        """Token ids and attention mask (B, P + T), prompts to the left, completions right; T.

        Widths are those of all prompts, so that every rank runs the same shapes.
        """
        asked = [prompt for prompt in self.prompts if prompt.completion_ids is not None]
        num_prompt = max(len(prompt.prompt_ids) for prompt in asked)
        num_completion = max(len(prompt.completion_ids) for prompt in asked)
        ids = torch.zeros(len(indices), num_prompt + num_completion, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            prompt, completion = self.prompts[index].prompt_ids, self.prompts[index].completion_ids
            text = slice(num_prompt - len(prompt), num_prompt + len(completion))
            ids[row, text] = torch.tensor([*prompt, *completion])
            mask[row, text] = 1
        return ids, mask, num_completion

    @contextmanager
    def _asking(self) -> Iterator[PreTrainedModel]:
        """The model in evaluation mode, its weights whole; afterwards all is as it was."""
        trainer = self.trainer
        with (
            _random_states_kept(),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=getattr(trainer.args, "ds3_gather_for_generation", True),
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            _evaluation_mode(model),
            torch.no_grad(),
            trainer.accelerator.autocast(),
        ):
            yield model


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Whatever draws inside, the generators of this process go on as if nothing had."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    devices = [] if accelerator is None else [torch.accelerator.current_device_index()]
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; afterwards each module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
