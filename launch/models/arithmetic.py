"""The bundled arithmetic task for `make_model.py`: its tokenizer, its batches, its accuracy.

Prompts are drawn without end from the training split; the loss is on the answers.
"""

import argparse
from itertools import count

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from launch.models.training import build_model, train
from pipeline.data.arithmetic import MODULUS, OPERATIONS, generate_rows
from pipeline.data.tasks import Row
from pipeline.evaluation.accuracy import greedy_accuracy
from rewards.correctness import exact

SPECIAL_TOKENS = ("<pad>", "<end>", "<unk>")
MAX_LENGTH = 64

DEFAULTS = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_layers": 3,
    "num_heads": 4,
    "steps": 1400,
    "batch_size": 512,
}
"""The shipped model's."""


def make(
    arguments: argparse.Namespace,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, int, dict]:
    """Trains and measures on the held-out prompts every run uses.

    Returns:
        Model, tokenizer, steps taken, and what was measured.
    """
    tokenizer = build_tokenizer()
    model = build_model(arguments, tokenizer)
    drawn = (
        generate_rows(arguments.batch_size, seed, "train") for seed in count(arguments.seed * 10**6)
    )
    steps = train(model, (encode_rows(tokenizer, rows) for rows in drawn), arguments)
    result = greedy_accuracy(
        model.eval(),
        tokenizer,
        [Row(*pair) for pair in generate_rows(2000, 0, "test")],
        lambda prompt: tokenizer(prompt)["input_ids"],
        exact,
        max_new_tokens=6,
        batch_size=500,
    )
    measured = {"accuracy": result.accuracy, "num_prompts": result.num_prompts}
    return model, tokenizer, steps, measured


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per two-digit residue and per sign; padding never ends a sequence."""
    tokens = [*SPECIAL_TOKENS, *(f"{value:02d}" for value in range(MODULUS)), *OPERATIONS, "="]
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d|\D"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) token ids, padded on the right, and labels, -100 except on answer and end token."""
    batch = tokenizer(
        [prompt + answer + tokenizer.eos_token for prompt, answer in rows],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )["input_ids"]
    labels = batch.masked_fill(batch == tokenizer.pad_token_id, -100)
    labels[:, : len(tokenizer(rows[0][0])["input_ids"])] = -100
    return batch, labels
