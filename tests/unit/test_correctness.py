"""Verifiers against cases worked out by hand, and against completions that try to break them."""

import pickle
import sys
import threading
import time

import pytest

from rewards.correctness import MAX_DIGITS, VERIFIERS, Correctness, exact, find_verifier

CASES = {
    "exact": [
        ("42", "42", 1),
        (" 42\n", "42", 1),
        ("42.", "42", 0),
        ("", "42", 0),
        ("Yes", "yes", 0),
    ],
    "numeric": [
        ("42", "42", 1),
        ("first 7, then 42.", "42", 1),
        ("42 or 7", "42", 0),
        ("it costs $1,234.50", "1234.5", 1),
        ("-$5", "-5", 1),
        ("$-5", "-5", 1),
        ("x = \u22125", "-5", 1),
        ("10-5", "5", 1),
        ("(2)-5", "5", 1),
        ("a-5", "5", 1),
        ("= -5", "5", 0),
        ("1,2,3", "3", 1),
        ("1,2345", "2345", 1),
        ("007", "7", 1),
        (".5", "0.50", 1),
        ("1.2.3", "3", 1),
        ("0.1", "0.10000000000000000000000001", 0),
        ("no number", "42", 0),
        ("", "", 0),
        ("٤٢", "42", 0),
        ("9" * (MAX_DIGITS + 1), "9" * (MAX_DIGITS + 1), 0),
        ("9" * MAX_DIGITS, "9" * MAX_DIGITS, 1),
    ],
    "gsm8k": [
        ("6 * 7 = 42\n#### 42", "so it is <<6*7=42>>42.\n#### 42", 1),
        ("#### 42 apples for 3 people", "#### 42", 1),
        ("#### 7 no, #### 42", "#### 42", 1),
        ("The answer is $1,042.", "#### 1042", 1),
        ("42 ####", "#### 42", 0),
        ("#### 41 or 42", "#### 42", 0),
        ("the answer is 42", "42", 1),
    ],
    "math": [
        (r"so \boxed{\frac{84}{2}}", "42", 1),
        ("The answer is 42.", "42", 1),
        (r"$x^2 + 1$", "1+x^2", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{2,1}", r"\{1,2\}", 1),
        (r"\boxed{43}", "42", 0),
        ("", "42", 0),
        ("42", "", 0),
    ],
}


@pytest.mark.parametrize(
    ("verifier", "completion", "answer", "reward"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_by_hand(verifier, completion, answer, reward):
    assert VERIFIERS[verifier](completion, answer) == float(reward)


def test_every_verifier_has_cases():
    assert set(CASES) == set(VERIFIERS)


HOSTILE = {
    "megabyte of digits": "9" * 1_000_000,
    "megabyte of groups": "1" + ",234" * 250_000 + "5",
    "megabyte of points": "1." * 500_000,
    "megabyte of minus": "-" * 1_000_000,
    "megabyte of marks": "####" * 250_000,
    "boxed digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "power tower": "10**10**10",
    "LaTeX power tower": r"\boxed{10^{10^{10}}}",
    "factorial": r"\boxed{99999999999!}",
    "nested fractions": r"\frac{" * 3000 + "1" + "}{2}" * 3000,
    "open braces": r"\boxed{" * 1000,
    "parentheses": "(" * 2000 + ")" * 2000,
    "dollars": "$" * 4000,
    "control characters": "\x00\x1b[2J\x07\ud800",
    "code": "__import__('os')._exit(1)",
}


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_completion_is_wrong_and_quick(verifier, attack):
    start = time.monotonic()
    assert VERIFIERS[verifier](HOSTILE[attack], "42") == 0.0
    assert time.monotonic() - start < 10


def test_math_does_not_execute_a_completion(tmp_path):
    target = tmp_path / "made"
    VERIFIERS["math"](f"$open('{target}', 'w')$ open('{target}', 'w') 1+open('{target}', 'w')", "1")
    assert not target.exists()


def test_math_refuses_a_thread_without_time_limit():
    caught = []

    def run():
        try:
            VERIFIERS["math"]("1", "1")
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_reward_function_takes_texts_and_messages():
    reward = pickle.loads(pickle.dumps(Correctness(exact)))
    assert reward.__name__ == "correctness"
    texts = reward(prompts=["a", "b"], completions=["1", "2"], answer=["1", "3"], extra=[0, 0])
    messages = [[{"role": "assistant", "content": "1"}], [{"role": "assistant", "content": "2"}]]
    assert texts == [1.0, 0.0]
    assert reward(["a", "b"], messages, answer=["1", "2"]) == [1.0, 1.0]


def test_find_verifier_by_name_and_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_verifier.py").write_text("def longer(completion, answer):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find_verifier("exact") is exact
    verifier = find_verifier("my_verifier:longer")
    assert Correctness(verifier)(["p"], ["c"], ["a"]) == [0.5]
    with pytest.raises(ValueError, match="'exakt' is not a dotted path"):
        find_verifier("exakt")
