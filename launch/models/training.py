"""The training loop of `make_model.py`: a fresh Llama, Muon and AdamW, a cosine schedule.

Muon (`torch.optim.Muon`, Keller Jordan 2024) trains the decoder matrices, AdamW the rest. The rate
rises over 100 steps and falls as half a cosine to 0. Time is the processor's, of all threads, so
that a busy machine changes nothing.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.models.prunable import prunable_weights

WARMUP_STEPS = 100
REPORT_EVERY_STEPS = 100


def build_model(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """A Llama with grouped-query attention, two query heads to a key head, and tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            num_key_value_heads=max(1, arguments.num_heads // 2),
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def build_optimizers(
    model: LlamaForCausalLM, arguments: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the decoder matrices, AdamW for embeddings and norms."""
    matrices = list(prunable_weights(model).values())
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=arguments.muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=arguments.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    arguments: argparse.Namespace,
    measure: Callable[[], str] = lambda: "",
) -> int:
    """Trains for `arguments.steps`, or for `arguments.minutes` of the processor where given.

    Args:
        model: Trained in place.
        batches: (B, S) token ids, padded on the right, and labels, -100 where the loss leaves a
            token out. As many as there are steps.
        arguments: Rates, steps and minutes.
        measure: Called every 100 steps; what it says is printed.

    Returns:
        The steps taken.
    """
    optimizers = build_optimizers(model, arguments)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, step = time.process_time(), 0
    while True:
        minutes = (time.process_time() - started) / 60
        progress = minutes / arguments.minutes if arguments.minutes else step / arguments.steps
        if progress >= 1:
            return step
        factor = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        ids, labels = next(batches)
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % REPORT_EVERY_STEPS == 0:
            line = f"{minutes:5.1f} min  step {step}  loss {loss.item():.4f}  {measure()}"
            print(line.rstrip(), flush=True)
