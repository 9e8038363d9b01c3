"""KL of a changed model to the dense one it was, row by row of the calibration set.

The dense model is kept as the last hidden states at its scored positions: the output head is never
pruned, so it turns them into the same logits again, a chunk at a time. With a vocabulary of 128,256
a token takes 8 KiB in bf16 at a hidden size of 4,096; its logits would take 250.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llama import LlamaForCausalLM

from pipeline.evaluation.agreement import kl_divergence
from pipeline.evaluation.completions import MAX_LOGITS
from pipeline.pruning.batches import IGNORED_LABEL, CalibrationBatch


class DenseKl:
    """KL(dense || model as it is now) of the rows that have a scored token."""

    def __init__(self, model: LlamaForCausalLM, batches: Sequence[CalibrationBatch]):
        """Runs the dense model once.

        Args:
            model: Dense, in evaluation mode. Whoever changes its decoder layers afterwards gets the
                KL of that change.
            batches: Rows with labels on the tokens to score. How they are cut does not matter, but
                the largest batch is the largest forward pass.
        """
        self._model = model
        self._rows = [row for batch in batches for row in _scored_rows(batch)]
        self._batch_size = max((len(batch.input_ids) for batch in batches), default=1)
        self._dense = {
            row: hidden.cpu()
            for part in self._parts(range(self.num_rows))
            for row, hidden in zip(part, self._hidden(part), strict=True)
        }

    @property
    def num_rows(self) -> int:
        """Rows with at least one scored token."""
        return len(self._rows)

    @property
    def num_tokens(self) -> int:
        """Scored tokens of all rows; a row's first token has nothing that predicts it."""
        return sum(int(is_scored.sum()) for _, is_scored in self._rows)

    @torch.no_grad()
    def nats(self, rows: Iterable[int]) -> dict[int, float]:
        """KL of some rows, each summed over its scored tokens; inf where it is not finite."""
        return {
            row: _finite(kl.sum(dtype=torch.float64).item())
            for part in self._parts(rows)
            for row, kl in zip(part, self._token_kl(part), strict=True)
        }

    def _parts(self, rows: Iterable[int]) -> list[list[int]]:
        """Batches of rows, rows of one length together."""
        rows = sorted(rows, key=lambda row: len(self._rows[row][0]))
        return [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]

    @torch.no_grad()
    def _hidden(self, part: Sequence[int]) -> tuple[Tensor, ...]:
        """For each row the (n, hidden) last hidden states that predict its n scored tokens."""
        device = self._model.device
        ids, is_scored = zip(*(self._rows[row] for row in part), strict=True)
        is_token = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        hidden = self._model.model(
            input_ids=pad_sequence(ids, batch_first=True).to(device),
            attention_mask=is_token.to(device),
            use_cache=False,
        ).last_hidden_state
        predicts = pad_sequence(is_scored, batch_first=True)[:, 1:].to(device)
        return hidden[:, :-1][predicts].split([int(row.sum()) for row in is_scored])

    def _token_kl(self, part: Sequence[int]) -> tuple[Tensor, ...]:
        """For each row the (n,) KL at its n scored tokens, logits a chunk at a time."""
        head = self._model.lm_head
        hidden = self._hidden(part)
        dense = torch.cat([self._dense[row] for row in part]).to(self._model.device)
        size = max(1, MAX_LOGITS // head.out_features)
        pairs = zip(dense.split(size), torch.cat(hidden).split(size), strict=True)
        kl = [kl_divergence(head(old).float(), head(new).float()) for old, new in pairs]
        return torch.cat(kl).split([len(row) for row in hidden])


def _scored_rows(batch: CalibrationBatch) -> list[tuple[Tensor, Tensor]]:
    """Without padding: token ids (S,) int64 and which of them are scored (S,) bool."""
    rows = []
    for input_ids, attention_mask, labels in zip(*batch, strict=True):
        is_token = attention_mask.bool()
        is_scored = labels[is_token] != IGNORED_LABEL
        is_scored[:1] = False
        if is_scored.any():
            rows.append((input_ids[is_token], is_scored))
    return rows


def _finite(nats: float) -> float:
    return nats if math.isfinite(nats) else math.inf
