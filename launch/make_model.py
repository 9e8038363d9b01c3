"""Trains a Llama from scratch, on the bundled task or on the text of a task file.

The shipped one was made by

    python launch/make_model.py --output_dir pipeline/models/bundled

and the dense rival with 5 % of its decoder weights by adding the smaller sizes (RESULTS.md). With
`--task FILE.jsonl --prompt_column question --answer_column answer` the same loop trains on the rows
of that file (`launch/models/text.py`). Time is the processor's, of all threads.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from launch.models import arithmetic, text
from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights

FILE_KEYS = ("task", "prompt_column", "answer_column", "vocab_size")
"""What only a task file has."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Sizes, steps and batch size default to those of the kind of task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task", default="bundled", help="bundled, or a file of JSON lines")
    parser.add_argument("--prompt_column", default="prompt", help="of the file")
    parser.add_argument("--answer_column", default="answer", help="of the file")
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens to learn from a file")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--intermediate_size", type=int)
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--num_heads", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="processor minutes, instead of --steps")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--muon_lr", type=float, default=1e-2)
    parser.add_argument("--adamw_lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    defaults = (arithmetic if arguments.task == "bundled" else text).DEFAULTS
    for key, value in defaults.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: set 1 or more")
    heads = arguments.num_heads
    if heads < 1 or arguments.hidden_size % (2 * heads) or heads % max(1, heads // 2):
        parser.error(
            f"--num_heads {heads}: set 1, 3 or an even number, and --hidden_size, which is "
            f"{arguments.hidden_size}, to a multiple of twice as many"
        )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Trains, measures on held-out prompts, and saves.

    Returns:
        The exit status: 2 where the task file cannot be used.
    """
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(arguments.seed)
    bundled = arguments.task == "bundled"
    started = time.process_time()
    try:
        model, tokenizer, steps, measured = (arithmetic if bundled else text).make(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    minutes = (time.process_time() - started) / 60
    left_out = ("output_dir", *(FILE_KEYS if bundled else ()))
    facts = {
        "decoder_weights": sum(weight.numel() for weight in prunable_weights(model).values()),
        "all_weights": sum(parameter.numel() for parameter in model.parameters()),
        **measured,
        **{key: value for key, value in vars(arguments).items() if key not in left_out},
        "steps": steps,
        "minutes": round(minutes, 2),
    }
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    (arguments.output_dir / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
