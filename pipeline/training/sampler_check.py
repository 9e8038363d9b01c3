"""Whether vLLM samples with the student's weights, seen in its own log-probabilities.

vLLM holds a copy of the weights, to which TRL sends the masked ones after every step. Where they
did not arrive it samples from another model, and nothing fails: importance sampling only cuts what
does not fit. But TRL has vLLM's log-probability of every token, log p, beside the student's, log q:

    E |log p - log q|  >=  E (log p - log q)  =  KL(vLLM || student)

over vLLM's tokens. The same weights differ by rounding alone, in bf16 by some hundredths of a nat;
the dense model and a student that was just pruned by whole nats.

Left out: a copy so near the student that the limit hides it, such as that of the step before; and
sampling by top_p, top_k, min_p or a repetition penalty, where vLLM speaks of what these leave over.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ranks import gather_from_all

LIMIT = 0.5
"""Nats per token, mean over the batch."""


def check_sampler(arguments: Any, output: dict[str, Tensor]) -> None:
    """Refuses a batch that other weights have sampled. Every rank calls it.

    Args:
        arguments: TRL's, of GRPO.
        output: What TRL made of the batch: `completion_mask` (B, T), and under vLLM with importance
            sampling `sampling_per_token_logps` and `old_per_token_logps` (B, T); else nothing is
            checked. NaN where vLLM gave none.

    Raises:
        UserError: On every rank.
    """
    if not {"sampling_per_token_logps", "old_per_token_logps"} <= output.keys():
        return
    is_cut = arguments.top_p < 1 or arguments.top_k or arguments.min_p
    if is_cut or arguments.repetition_penalty != 1:
        return
    gap = (output["old_per_token_logps"] - output["sampling_per_token_logps"]).float().abs()
    known = output["completion_mask"].bool() & ~torch.isnan(gap)
    parts = gather_from_all((float(gap[known].sum()), int(known.sum())))
    total, count = (sum(column) for column in zip(*parts, strict=True))
    if total > LIMIT * count:
        raise UserError(
            "grpo.use_vllm: true: log-probabilities of vLLM and of the student differ by "
            f"{total / count:.2f} nats per token on average, so it samples with other weights; "
            "give this run a server of its own, with a model of the student's shape, or set false"
        )
