"""Accuracy, perplexity and KL against hand-computed values and plain loops.

`bigram_model` is a Llama whose next-token distribution is a table P[last token, next token]: its
layers add nothing, so that every number can be worked out on paper.
"""

import math
from dataclasses import astuple

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.data.tasks import Row
from pipeline.evaluation import completions
from pipeline.evaluation.accuracy import greedy_accuracy
from pipeline.evaluation.agreement import agreement_with_teacher, kl_divergence
from pipeline.evaluation.completions import completion_batches
from pipeline.evaluation.perplexity import completion_perplexity, token_nll


def tiny_llama(vocab_size: int, *, hidden_size: int = 16, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def bigram_model(probabilities: list[list[float]]) -> LlamaForCausalLM:
    size = len(probabilities)
    model = tiny_llama(size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 16))
        # RMSNorm turns the one-hot embedding into sqrt(hidden_size) times itself.
        logits = torch.tensor(probabilities).log() / math.sqrt(16)
        model.lm_head.weight.copy_(torch.cat([logits.T, torch.zeros(size, 16 - size)], dim=1))
    return model


def random_pairs(num_rows: int = 9, vocab_size: int = 11):
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    return [(tokens(1 + row % 4), tokens(1 + (3 * row) % 5)) for row in range(num_rows)]


def plain_log_probs(model, prompt, completion) -> list[torch.Tensor]:
    """Log-probabilities (V,) before each completion token, one forward of one row at a time."""
    rows = []
    for end in range(len(completion)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion[:end]]])).logits[0, -1]
        rows.append(logits.log_softmax(-1))
    return rows


P = [[0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.7, 0.1, 0.2]]
Q = [[0.2, 0.5, 0.3], [0.5, 0.25, 0.25], [0.6, 0.2, 0.2]]


def test_perplexity_on_three_tokens_matches_paper():
    # 0 -> 1 -> 2 has 0.6 * 0.5, and 2 -> 0 has 0.7: three tokens; 2 -> 2 is context, not scored.
    result = completion_perplexity(bigram_model(P), [([0], [1, 2]), ([2, 2], [0])], batch_size=2)
    assert result.value == pytest.approx((0.6 * 0.5 * 0.7) ** (-1 / 3), rel=1e-5)
    assert (result.num_tokens, result.seq_len) == (3, 3)


def test_token_nll_comes_row_by_row():
    (batch,) = completion_batches([([0], [1, 2, 0]), ([2, 2], [0])], batch_size=2)
    # The shorter row comes first.
    expected = [-math.log(p) for p in (0.7, 0.6, 0.5, 0.7)]
    assert token_nll(bigram_model(P), batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert batch.targets.tolist() == [0, 1, 2, 0]


def test_perplexity_matches_a_plain_loop():
    model, pairs = tiny_llama(11), random_pairs()
    log_probs = [
        log_prob[token].item()
        for prompt, completion in pairs
        for log_prob, token in zip(
            plain_log_probs(model, prompt, completion), completion, strict=True
        )
    ]
    result = completion_perplexity(model, pairs, batch_size=4)
    assert result.num_tokens == len(log_probs)
    assert result.value == pytest.approx(math.exp(-sum(log_probs) / len(log_probs)), rel=1e-4)


def test_padding_batches_and_chunks_change_nothing(monkeypatch):
    model, teacher, pairs = tiny_llama(11), tiny_llama(11, seed=1), random_pairs()
    perplexity = completion_perplexity(model, pairs, batch_size=1).value
    agreement = astuple(agreement_with_teacher(model, teacher, pairs, batch_size=1))
    monkeypatch.setattr(completions, "MAX_LOGITS", 4 * 11)
    assert completion_perplexity(model, pairs, batch_size=9).value == pytest.approx(
        perplexity, 1e-5
    )
    batched = agreement_with_teacher(model, teacher, pairs[::-1], batch_size=5)
    assert astuple(batched) == pytest.approx(agreement, rel=1e-5)


@pytest.mark.parametrize("factor", [1e6, math.nan])
def test_what_a_broken_model_scores_is_none_not_a_number(factor):
    model = bigram_model(P)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    assert completion_perplexity(model, [([0], [0])], batch_size=1).value is None
    kl = agreement_with_teacher(model, bigram_model(P), [([0], [0])], batch_size=1).kl
    assert (kl is None) == math.isnan(factor)


@pytest.mark.parametrize("pairs", [[], [([], [1])], [([1], [])]])
def test_rows_without_tokens_are_refused(pairs):
    with pytest.raises(ValueError, match="at least one row"):
        completion_perplexity(bigram_model(P), pairs, batch_size=2)


def test_kl_to_teacher_matches_paper():
    # Predictions after token 0 (twice) and after token 1 (once); the teacher is P.
    after_0 = 0.1 * math.log(0.1 / 0.2) + 0.6 * math.log(0.6 / 0.5)
    after_1 = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    result = agreement_with_teacher(
        bigram_model(Q), bigram_model(P), [([2, 0], [1, 2]), ([0], [0])], batch_size=2
    )
    assert result.kl == pytest.approx((2 * after_0 + after_1) / 3, rel=1e-4)
    # The likeliest token is 1 for both after 0, but 2 for P and 0 for Q after 1.
    assert result.top1 == pytest.approx(2 / 3)
    assert result.num_tokens == 3


def test_a_model_agrees_with_itself_exactly():
    model = tiny_llama(11)
    result = agreement_with_teacher(model, model, random_pairs(), batch_size=4)
    assert (result.kl, result.top1) == (0.0, 1.0)


def test_kl_matches_a_plain_loop():
    model, teacher, pairs = tiny_llama(11), tiny_llama(11, seed=1), random_pairs()
    values, same = [], []
    for pair in pairs:
        rows = zip(plain_log_probs(teacher, *pair), plain_log_probs(model, *pair), strict=True)
        for p, q in rows:
            values.append(sum((p[v].exp() * (p[v] - q[v])).item() for v in range(11)))
            same.append(int(p.argmax() == q.argmax()))
    result = agreement_with_teacher(model, teacher, pairs, batch_size=4)
    assert result.kl == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert result.top1 == pytest.approx(sum(same) / len(same))


def test_kl_is_never_negative_and_survives_vanishing_probabilities():
    logits = torch.tensor([[0.0, -300.0, 5.0], [1.0, 1.0, 1.0]])
    kl = kl_divergence(logits, logits.flip(0))
    assert torch.isfinite(kl).all()
    assert (kl > 0).all()


def test_vocabularies_of_different_size_are_refused():
    with pytest.raises(ValueError, match="3 entries and the teacher's 11"):
        agreement_with_teacher(bigram_model(P), tiny_llama(11), [([0], [1])], batch_size=1)


WORDS = ["<pad>", "<end>", "a", "b", "c"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def test_greedy_accuracy_on_answers_known_in_advance():
    # a -> b -> end, and c -> c for ever.
    likely = {0: 0, 1: 0, 2: 3, 3: 1, 4: 4}
    table = [[0.8 if likely[i] == j else 0.05 for j in range(5)] for i in range(5)]
    model, tokenizer = bigram_model(table), word_tokenizer()
    rows = [Row("a", "b"), Row("c", "b"), Row("c c a", "b"), Row("c", "c c c")]
    result = greedy_accuracy(
        model,
        tokenizer,
        rows,
        lambda prompt: tokenizer(prompt)["input_ids"],
        lambda completion, answer: float(completion == answer),
        max_new_tokens=3,
        batch_size=2,
    )
    assert result.completions == ["b", "c c c", "b", "c c c"]
    assert result.correct == [True, False, True, True]
    assert (result.accuracy, result.num_prompts) == (0.75, 4)


def test_partial_credit_is_not_correct():
    result = greedy_accuracy(
        tiny_llama(5),
        word_tokenizer(),
        [Row("a", "0.5"), Row("b", "1")],
        lambda prompt: [WORDS.index(prompt)],
        lambda completion, answer: float(answer),
        max_new_tokens=1,
        batch_size=2,
    )
    assert result.correct == [False, True]


def test_accuracy_of_no_prompts_is_refused():
    with pytest.raises(ValueError, match="at least one held-out prompt"):
        greedy_accuracy(None, None, [], None, None, max_new_tokens=1, batch_size=1)
