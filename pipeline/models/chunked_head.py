"""An output head that never holds the logits of all tokens at once.

The logits of a batch are tokens x vocabulary: 3,200 tokens of a 128,256-entry vocabulary take
1.6 GB in fp32, several times over with their gradients. What training needs of them is a few
numbers per token. So the head hands its logits on in chunks of at most `MAX_LOGITS`, keeps what a
function makes of each chunk, and computes the chunk again for its gradient.

The loop stands inside the module's own forward: under ZeRO-3 the weight is then gathered once for
all chunks, and every rank gathers equally often, however many tokens it has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

MAX_LOGITS = 2**25
"""Logits of one chunk, 128 MiB in fp32. With gradients about five tensors of this size live at
once, without them four."""

Score = Callable[[Tensor, slice], Tensor]
"""fp32 logits of some rows (n, V), and which rows they are -> (n, M) fp32."""


class ChunkedHead(nn.Linear):
    """A linear head; inside `scoring` it returns scores in the place of logits."""

    max_logits = MAX_LOGITS
    _job: tuple[Tensor, Score] | None = None

    @contextmanager
    def scoring(self, positions: Tensor, score: Score) -> Iterator[None]:
        """Makes each call return scores.

        Args:
            positions: Which positions to score, (B, S) bool; the calls' inputs are (B, S, H).
            score: Called with the logits of some of them, in row-major order.
        """
        self._job = positions, score
        try:
            yield
        finally:
            self._job = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, H) to logits (B, S, V); inside `scoring` to (B, S, M), 0 where none is wanted."""
        if self._job is None:
            return super().forward(hidden)
        positions, score = self._job
        rows = hidden[positions]
        size = max(1, self.max_logits // self.out_features)
        parts = []
        for start in range(0, max(1, len(rows)), size):
            chosen = slice(start, start + size)
            read = partial(self._read, score=score, chosen=chosen)
            if torch.is_grad_enabled():
                parts.append(
                    checkpoint(read, rows[chosen], use_reentrant=False, preserve_rng_state=False)
                )
            else:
                parts.append(read(rows[chosen]))
        scores = torch.cat(parts)
        empty = scores.new_zeros(*positions.shape, scores.size(-1))
        return empty.index_put((positions,), scores)

    def _read(self, rows: Tensor, score: Score, chosen: slice) -> Tensor:
        return score(F.linear(rows, self.weight, self.bias).float(), chosen)


def chunked_head(model: PreTrainedModel) -> ChunkedHead:
    """The model's output head, from the first call on one that can score in chunks.

    The weights stay the same tensors under the same names. To be called before DeepSpeed takes the
    model.
    """
    head = model.get_output_embeddings()
    if isinstance(head, ChunkedHead):
        return head
    chunked = ChunkedHead(head.in_features, head.out_features, head.bias is not None, device="meta")
    chunked.weight, chunked.bias = head.weight, head.bias
    model.set_output_embeddings(chunked.train(head.training))
    return chunked


def score_completions(
    model: nn.Module,
    head: ChunkedHead,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion: int,
    score: Score,
) -> Tensor:
    """One forward pass whose head sees the completions only.

    Args:
        model: A causal language model, or a wrapper around it.
        head: Its head.
        input_ids: (B, S) int64, prompts padded on the left, completions on the right.
        attention_mask: (B, S), 1 = token.
        num_completion: T, the completions' part of S.
        score: Called with the logits that predict completion tokens, padding left out.

    Returns:
        (B, T, M) fp32; 0 at padding.
    """
    wanted = F.pad(attention_mask[:, -num_completion:].bool(), (0, 1))
    with head.scoring(wanted, score):
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=num_completion + 1,
            use_cache=False,
        )
    return outputs.logits[:, :-1]
