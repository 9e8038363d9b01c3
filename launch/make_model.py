"""Trains a Llama from scratch on the bundled task.

The shipped one was made by

    python launch/make_model.py --output_dir pipeline/models/bundled

and the dense rival with 5 % of its decoder weights by adding the smaller sizes (RESULTS.md).
Prompts are drawn without end from the training split; the loss is on the answers. Time is the
processor's, of all threads, so that a busy machine changes nothing. Muon
(`torch.optim.Muon`, Keller Jordan 2024) trains the decoder matrices, AdamW the rest (RESULTS.md).
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.data.arithmetic import MODULUS, OPERATIONS, generate_rows
from pipeline.data.tasks import Row
from pipeline.evaluation.accuracy import greedy_accuracy
from pipeline.models.prunable import prunable_weights
from rewards.correctness import exact

SPECIAL_TOKENS = ("<pad>", "<end>", "<unk>")
MAX_LENGTH = 64


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


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast):
    """A Llama with grouped-query attention, two query heads to a key head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            num_key_value_heads=max(1, arguments.num_heads // 2),
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def build_optimizers(model: LlamaForCausalLM, arguments: argparse.Namespace):
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


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]):
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


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments) -> int:
    """Trains for a number of steps, or of processor minutes where given. Returns the steps."""
    optimizers = build_optimizers(model, arguments)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, step = time.process_time(), 0
    while True:
        minutes = (time.process_time() - started) / 60
        progress = minutes / arguments.minutes if arguments.minutes else step / arguments.steps
        if progress >= 1:
            return step
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        rows = generate_rows(arguments.batch_size, arguments.seed * 10**6 + step, "train")
        ids, labels = encode_rows(tokenizer, rows)
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"{minutes:5.1f} min  step {step}  loss {loss.item():.4f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The sizes default to the shipped model's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--intermediate_size", type=int, default=288)
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--minutes", type=float, help="processor minutes, instead of --steps")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--muon_lr", type=float, default=1e-2)
    parser.add_argument("--adamw_lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    """Trains, measures on the held-out prompts every run uses, and saves."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(arguments, tokenizer)
    started = time.process_time()
    steps = train(model, tokenizer, arguments)
    minutes = (time.process_time() - started) / 60
    rows = [Row(*pair) for pair in generate_rows(2000, 0, "test")]
    result = greedy_accuracy(
        model.eval(),
        tokenizer,
        rows,
        lambda prompt: tokenizer(prompt)["input_ids"],
        exact,
        max_new_tokens=6,
        batch_size=500,
    )
    facts = {
        "decoder_weights": sum(weight.numel() for weight in prunable_weights(model).values()),
        "all_weights": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": result.accuracy,
        "num_prompts": result.num_prompts,
        **{key: value for key, value in vars(arguments).items() if key != "output_dir"},
        "steps": steps,
        "minutes": round(minutes, 2),
    }
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    (arguments.output_dir / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
