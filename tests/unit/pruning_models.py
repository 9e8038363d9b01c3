"""Tiny random Llamas and calibration rows for the pruning tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.pruning.batches import calibration_batches

PAD = 0


def make_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 23,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "pad_token_id": PAD,
            **changes,
        }
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_rows(num_rows=7, seed=0):
    """Prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 23, (length,), generator=generator).tolist()

    return [draw(2, 8) for _ in range(num_rows)], [draw(1, 5) for _ in range(num_rows)]


def make_batches(batch_size=3, **arguments):
    return calibration_batches(*make_rows(**arguments), pad_token_id=PAD, batch_size=batch_size)
