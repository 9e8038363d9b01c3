"""Rollouts: completions that a model samples for prompts, verified and kept on disk.

`generate` is the one place outside TRL that samples: teacher data, probes and evaluation use it.
Prompts are sorted by length, cut into batches and padded on the left, so that the last prompt token
of every row stands in the same column; each completion ends with the first end token.

Left out: sharded models (ZeRO-3) and several processes sharing the prompts.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.lock import check_lock

PROGRESS_DELAY_SECONDS = 2.0
ATTEMPTS = 4
"""Completions sampled for a row until one is right."""


class PromptAndAnswer(Protocol):
    """What a task's row offers."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Rollout:
    """One completion, the end token included where it was reached, and its verified reward."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    completion_ids: list[int]
    reward: float


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: str | None = None,
) -> list[list[int]]:
    """Complete each prompt, greedily or by sampling from the whole vocabulary.

    Global random state is left as it was. Sampled completions depend on `seed` and `batch_size`,
    greedy ones on neither.

    Args:
        model: Causal language model; runs in eval mode on its own device.
        tokenizer: Gives the end token, and the padding token if it has one.
        prompt_ids: N token lists, none of them empty.
        max_new_tokens: Length limit of a completion in tokens.
        batch_size: Prompts per forward pass.
        temperature: 0 takes the likeliest token, otherwise the logits are divided by it.
        seed: Of the sampling.
        progress: Text of a progress bar, shown if the work takes longer than a few seconds.

    Returns:
        N completions in the order of the prompts: token ids, the end token included when reached,
        nothing after it.
    """
    config = _generation_config(tokenizer, max_new_tokens, temperature)
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    completions: list[list[int]] = [[] for _ in prompt_ids]
    bar = tqdm(
        total=len(order),
        desc=progress,
        unit="prompt",
        disable=progress is None,
        delay=PROGRESS_DELAY_SECONDS,
    )
    with _seeded(seed, model.device), _eval_mode(model), bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = _pad_left(
                [prompt_ids[i] for i in batch], config.pad_token_id
            )
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
            )
            for i, tokens in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                completions[i] = _until_end(tokens, config.eos_token_id)
            bar.update(len(batch))
    return completions


def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptAndAnswer],
    encode: Callable[[str], list[int]],
    verifier: Callable[[str, str], float],
    *,
    num_rollouts: int,
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    seed: int,
    progress: str | None = None,
) -> list[Rollout]:
    """Sample completions for the rows in turn, starting again when all rows have one, and verify.

    Args:
        model: See `generate`.
        tokenizer: Decodes the completions for the verifier, without special tokens.
        rows: Prompts and answers, at least one.
        encode: Prompt text -> token ids.
        verifier: (completion text, answer) -> reward.
        num_rollouts: Completions to sample.
        max_new_tokens: See `generate`.
        batch_size: See `generate`.
        temperature: See `generate`.
        seed: See `generate`.
        progress: See `generate`.

    Returns:
        `num_rollouts` rollouts, the k-th for row k modulo the number of rows.
    """
    encoded = [encode(row.prompt) for row in rows[:num_rollouts]]
    picked = [k % len(rows) for k in range(num_rollouts)]
    completions = generate(
        model,
        tokenizer,
        [encoded[i] for i in picked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [
        Rollout(
            prompt=rows[i].prompt,
            answer=rows[i].answer,
            prompt_ids=encoded[i],
            completion_ids=completion,
            reward=float(verifier(text, rows[i].answer)),
        )
        for i, completion, text in zip(picked, completions, texts, strict=True)
    ]


def sample_verified_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptAndAnswer],
    encode: Callable[[str], list[int]],
    verifier: Callable[[str, str], float],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    seed: int,
    progress: str | None = None,
) -> list[Rollout]:
    """Sample one right completion for each row, trying `ATTEMPTS` times where it is wrong.

    Arguments as in `sample_rollouts`; greedy decoding has one attempt.

    Returns:
        Rollouts of reward 1 or more in the order of the rows; rows that no attempt got right are
        missing.
    """
    found: dict[int, Rollout] = {}
    for attempt in range(ATTEMPTS if temperature > 0 else 1):
        missing = [index for index in range(len(rows)) if index not in found]
        if not missing:
            break
        rollouts = sample_rollouts(
            model,
            tokenizer,
            [rows[index] for index in missing],
            encode,
            verifier,
            num_rollouts=len(missing),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed + attempt,
            progress=progress,
        )
        found |= {i: r for i, r in zip(missing, rollouts, strict=True) if r.reward >= 1}
    return [found[index] for index in sorted(found)]


def save_rollouts(path: str | Path, rollouts: Sequence[Rollout], provenance: dict) -> None:
    """Write rollouts as JSON lines: first where they come from and how many, then one a line.

    The file is written beside its place and renamed, so that a reader never sees half of it.

    Args:
        path: The file; its folder exists.
        rollouts: What to write.
        provenance: What they depend on (model, seed, temperature, ...), as JSON values. The caller
            compares it with its own before it uses the file again.

    Raises:
        UserError: It is in a run folder that another process has taken over.
    """
    path = Path(path)
    check_lock(path)
    header = {"provenance": provenance, "num_rollouts": len(rollouts)}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        for record in (header, *map(vars, rollouts)):
            file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_rollouts(path: str | Path) -> tuple[dict, list[Rollout]]:
    """Read what `save_rollouts` wrote.

    Args:
        path: The file.

    Returns:
        The provenance and the rollouts.

    Raises:
        UserError: The file is damaged.
        FileNotFoundError: There is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        header, *records = map(json.loads, lines)
        rollouts = [Rollout(**record) for record in records]
        provenance, num_rollouts = header["provenance"], header["num_rollouts"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it: it is sampled again.") from error
    if num_rollouts != len(rollouts):
        raise UserError(
            f"{path} is damaged: it says {num_rollouts} rollouts and holds {len(rollouts)}. "
            "Delete it: it is sampled again."
        )
    return provenance, rollouts


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Name every setting that the model's own generation config could otherwise fill in."""
    end = tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        top_p=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        use_cache=True,
        **(sampling if temperature > 0 else {"do_sample": False, "temperature": 1.0, "top_k": 50}),
    )


def _pad_left(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad B prompts to the longest: (token ids (B, S) int64, attention mask (B, S) int64)."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that sampling on `device` uses, and give them their states back."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
