"""pass@k against enumeration, and counts of sampled answers against answers known in advance."""

import math
from itertools import combinations

import pytest
import torch

from pipeline.data.arithmetic import generate_rows
from pipeline.data.tasks import Row
from pipeline.evaluation.accuracy import greedy_accuracy
from pipeline.evaluation.sampled_accuracy import SampledAccuracy, pass_at_k, sampled_accuracy
from pipeline.models.loading import load_model, load_tokenizer
from rewards.correctness import find_verifier
from tests.unit.test_evaluation import bigram_model, word_tokenizer

CASES = [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.parametrize(("n", "c", "k"), CASES)
def test_pass_at_k_is_the_share_of_choices_of_k_answers_with_a_right_one(n, c, k):
    right = [index < c for index in range(n)]
    choices = list(combinations(right, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_unbiased(k):
    n, p = 5, 0.3
    expected = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_counts_without_an_estimate_are_refused(n, c, k):
    with pytest.raises(ValueError, match="no estimate"):
        pass_at_k(n, c, k)


def test_pass_at_is_per_prompt():
    found = SampledAccuracy([0, 1, 4], num_samples=4, temperature=1.0)
    assert found.pass_at(1) == pytest.approx([0, 0.25, 1])
    assert found.pass_at(2) == pytest.approx([0, 0.5, 1])


def sample(table, rows, num_samples, verifier, batch_size=64):
    tokenizer = word_tokenizer()
    return sampled_accuracy(
        bigram_model(table),
        tokenizer,
        rows,
        lambda prompt: tokenizer(prompt)["input_ids"],
        verifier,
        num_samples=num_samples,
        temperature=1.0,
        max_new_tokens=2,
        batch_size=batch_size,
        seed=3,
    )


# <pad> <end> a b c: a -> b or c, and b and c end.
TABLE = [[0.2] * 5, [0.2] * 5, [1e-9, 1e-9, 1e-9, 0.3, 0.7], *[[1e-9, 1.0, 1e-9, 1e-9, 1e-9]] * 2]


def test_sampled_answers_come_as_often_as_the_model_says():
    found = sample(
        TABLE,
        [Row("a", "b"), Row("a", "c"), Row("b", ""), Row("a", "a")],
        1000,
        lambda completion, answer: float(completion == answer),
    )
    deviation = math.sqrt(0.3 * 0.7 * 1000)
    assert found.num_correct[0] == pytest.approx(300, abs=4 * deviation)
    assert found.num_correct[1] == pytest.approx(700, abs=4 * deviation)
    assert found.num_correct[2:] == [1000, 0]
    assert (found.num_samples, found.temperature) == (1000, 1.0)


def test_each_prompt_gets_the_verdicts_on_its_own_answers():
    verdicts: dict[str, list[bool]] = {"first": [], "second": []}

    def verifier(completion: str, answer: str) -> float:
        verdicts[answer].append(completion == "b")
        return float(completion == "b")

    # Prompts of different length are generated in another order than they are asked.
    rows = [Row("c c a", "first"), Row("a", "second")]
    found = sample(TABLE, rows, 7, verifier, batch_size=4)
    assert {len(v) for v in verdicts.values()} == {7}
    assert found.num_correct == [sum(v) for v in verdicts.values()]


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one held-out prompt"):
        sample(TABLE, [], 1, None)


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, its tokenizer, and prompts that it gets right and wrong."""
    rows = [Row(*pair) for pair in generate_rows(12, 0, "test")]
    return load_model("bundled"), load_tokenizer("bundled"), [*rows[:11], Row(rows[11].prompt, "?")]


def greedy_loop(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """One prompt, one token and one whole forward pass at a time."""
    ids, start = tokenizer(prompt)["input_ids"], len(tokenizer(prompt)["input_ids"])
    while len(ids) - start < max_new_tokens:
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def measured(bundled, function, **values):
    model, tokenizer, rows = bundled
    return function(
        model,
        tokenizer,
        rows,
        lambda prompt: tokenizer(prompt)["input_ids"],
        find_verifier("exact", 1.0),
        max_new_tokens=8,
        batch_size=5,
        **values,
    )


def test_greedy_accuracy_of_the_bundled_model_is_that_of_a_plain_loop(bundled):
    model, tokenizer, rows = bundled
    found = measured(bundled, greedy_accuracy)
    answers = [greedy_loop(model, tokenizer, row.prompt, 8) for row in rows]
    assert found.completions == answers
    assert found.correct == [a.strip() == r.answer for a, r in zip(answers, rows, strict=True)]
    assert 0 < found.accuracy < 1


def test_sampling_without_temperature_to_speak_of_is_greedy(bundled):
    greedy = measured(bundled, greedy_accuracy)
    found = measured(bundled, sampled_accuracy, num_samples=3, temperature=1e-3, seed=0)
    assert found.num_correct == [3 * right for right in greedy.correct]
