"""The text of a task file for `make_model.py`: its rows, and a tokenizer learned from them.

What the pipeline holds out as `test`, by a hash of the prompt 10 % of the rows, is validation; all
other rows are trained on. A row is its prompt, encoded as the pipeline encodes prompts, then its
answer, then the end token; the loss is on every token, so that the model can also be calibrated
and measured on running text. The tokenizer is a byte-level BPE (arXiv 1508.07909) with one token to
a digit, learned from the training rows; no text is unknown to it.

The unigram model (`pipeline/evaluation/unigram.py`) that the result is held against counts the
answers of the training rows. Left out: stopping early. Three epochs do not overfit.
"""

import argparse

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from launch.models.length_batches import length_batches
from launch.models.training import build_model, train
from pipeline.data.tasks import Row, load_task
from pipeline.evaluation.completions import TokenPair
from pipeline.evaluation.perplexity import completion_perplexity
from pipeline.evaluation.unigram import unigram_perplexity
from pipeline.models.prompts import encode_answer, encode_prompt

PAD_TOKEN, END_TOKEN = "<pad>", "<end>"
MAX_LENGTH = 1024
"""Positions of the model, in tokens; longer training rows are cut."""

NUM_WATCHED_ROWS = 100
"""Validation rows measured while training."""

DEFAULTS = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_layers": 4,
    "num_heads": 4,
    "steps": 1250,
    "batch_size": 16,
}
"""3.5 million weights, and three epochs of GSM8K."""


def make(
    arguments: argparse.Namespace,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, int, dict]:
    """Trains on a task file and measures on its validation rows.

    Returns:
        Model, tokenizer, steps taken, and what was measured.

    Raises:
        UserError: The file is not a task.
    """
    train_rows, validation_rows = load_rows(
        arguments.task,
        prompt_column=arguments.prompt_column,
        answer_column=arguments.answer_column,
    )
    tokenizer = learn_tokenizer(train_rows, arguments.vocab_size)
    train_pairs, validation_pairs = (
        encode_rows(tokenizer, rows) for rows in (train_rows, validation_rows)
    )
    model = build_model(arguments, tokenizer)
    batches = length_batches(
        [[*prompt, *answer][:MAX_LENGTH] for prompt, answer in train_pairs],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )

    def watch() -> str:  # no dropout, so training mode measures the same
        watched = completion_perplexity(model, validation_pairs[:NUM_WATCHED_ROWS], batch_size=16)
        return f"validation perplexity {watched.value}"

    steps = train(model, batches, arguments, watch)
    validation = completion_perplexity(model.eval(), validation_pairs, batch_size=16)
    measured = {
        "validation_perplexity": validation.value,
        "unigram_perplexity": unigram_perplexity(
            [answer for _, answer in train_pairs],
            [answer for _, answer in validation_pairs],
            len(tokenizer),
        ),
        "num_validation_tokens": validation.num_tokens,
        "num_validation_rows": len(validation_rows),
        "num_train_rows": len(train_rows),
        "num_train_tokens": sum(len(prompt) + len(answer) for prompt, answer in train_pairs),
    }
    return model, tokenizer, steps, measured


def load_rows(path: str, *, prompt_column: str, answer_column: str) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of a task file.

    Raises:
        UserError: As `pipeline.data.tasks.load_task`.
    """
    all_rows = 10**9
    task = load_task(
        path,
        prompt_column=prompt_column,
        answer_column=answer_column,
        num_train=all_rows,
        num_calibration=all_rows,
        num_probe=all_rows,
        num_test=all_rows,
        seed=0,
    )
    return [*task.train, *task.calibration, *task.probe], task.test


def learn_tokenizer(rows: list[Row], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens, but no fewer than 258; padding on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for row in rows for text in (row.prompt, row.answer))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[TokenPair]:
    """Prompt and completion of each row, the end token included."""
    return [
        (encode_prompt(tokenizer, row.prompt), encode_answer(tokenizer, row.answer)) for row in rows
    ]
