"""Verifiers against cases worked out by hand, and against completions that try to break them."""

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from pipeline.models.loading import load_tokenizer
from rewards.correctness import MAX_DIGITS, VERIFIERS, Correctness, exact, find_verifier
from rewards.time_limit import CLOCK_FACTOR, TimeLimited
from tests.unit.tiny_models import tiny

SECONDS = 0.3
FOUND = {name: find_verifier(name) for name in VERIFIERS}
HURRIED = {name: find_verifier(name, SECONDS) for name in VERIFIERS}

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
        ("\uff14\uff12", "42", 0),
        ("9" * (MAX_DIGITS + 1), "9" * (MAX_DIGITS + 1), 0),
        ("9" * MAX_DIGITS, "9" * MAX_DIGITS, 1),
        ("-" + "9" * 40, "-" + "9" * 39 + "8", 0),
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
        ("\uff14\uff12", "42", 0),
        (r"\boxed{٤٢}", "42", 0),
        (r"\boxed{10^{10^{10}}}", "10^{10^{10}}", 1),
        ("12 * 4 - 6", "42", 1),
        ("42" + " " * 4000, "42", 0),
    ],
}


@pytest.mark.parametrize(
    ("verifier", "completion", "answer", "reward"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_by_hand(verifier, completion, answer, reward):
    assert FOUND[verifier](completion, answer) == float(reward)


def test_every_verifier_has_cases():
    assert set(CASES) == set(VERIFIERS)


HANGS_MATH = {
    "power tower": "10**10**10",
    "LaTeX power tower": r"\boxed{10^{10^{10}}}",
    "factorial": r"\boxed{99999999999!}",
    "factorial tower": r"\boxed{9!!!!!!!!!!}",
    "binomial": r"\boxed{\binom{10^9}{5\cdot10^8}}",
}
HOSTILE = HANGS_MATH | {
    "megabyte of digits": "9" * 1_000_000,
    "megabyte of groups": "1" + ",234" * 250_000 + "5",
    "megabyte of points": "1." * 500_000,
    "megabyte of minus": "-" * 1_000_000,
    "megabyte of marks": "####" * 250_000,
    "megabyte of other digits": "٤२𝟏" * 333_333,
    "boxed digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "fractions, 10,000 deep": r"\frac{" * 10_000 + "1" + "}{2}" * 10_000,
    "fractions, 500 deep": r"\boxed{" + r"\frac{1}{" * 500 + "1" + "}" * 501,
    "roots, 10,000 deep": r"$" + r"\sqrt{" * 10_000 + "42" + "}" * 10_000 + "$",
    "open braces": r"\boxed{" * 1000,
    "parentheses": "(" * 2000 + ")" * 2000,
    "deep sum": "1+(" * 900 + "1" + ")" * 900,
    "dollars": "$" * 4000,
    "control characters": "\x00\x1b[2J\x07\r\n\u202e42\x00",
    "null bytes": "42\x00" * 1000,
    "lone surrogates": "\ud800 42\udfff",
    "code": "__import__('os')._exit(1)",
    "LaTeX code": r"\boxed{\text{__import__('os').system('exit 1')}}",
    "protocol": '42\n{"number": 1, "value": 1.0}\n',
}


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_completion_is_wrong_and_quick(verifier, attack):
    start = time.monotonic()
    assert HURRIED[verifier](HOSTILE[attack], "43") == 0.0
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("attack", HANGS_MATH)
def test_math_counts_what_hangs_and_goes_on(attack):
    before = HURRIED["math"].timeouts
    assert HURRIED["math"](HOSTILE[attack], "42") == 0.0
    assert HURRIED["math"].timeouts == before + 1
    assert HURRIED["math"](r"\boxed{42}", "42") == 1.0


def test_math_holds_its_limit_in_another_thread():
    got, before = [], HURRIED["math"].timeouts

    def run():
        got.append([HURRIED["math"](text, "42") for text in ("10**10**10", "42")])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert got == [[0.0, 1.0]]
    assert HURRIED["math"].timeouts == before + 1


WATCHED = """
import sys
from rewards.correctness import math

def watch(event, arguments):
    if event == "compile":
        seen.append(str(arguments[0]))
    if event == "exec":
        seen.extend(arguments[0].co_names)
    if event == "open" and arguments[1] not in ("r", "rb", None):
        seen.append("planted file")
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        seen.append("planted " + event)

seen = []
sys.addaudithook(watch)
call = "planted('x')"
for code in (call, f"1+{call}", f"__import__('os').system({call})", f"open('planted','w')",
             f"lambda:{call}", f"[{call} for x in 1,]"):
    for around in ("%s", "$%s$", r"\\boxed{%s}", r"\\boxed{\\text{%s}}", r"\\(%s\\)",
                   r"\\operatorname{%s}(1)", "answer: 1+%s", "the final answer is 1 %s. I hope",
                   "$$x=%s$$", "1/2+(%s)", r"$\\mathrm{%s}_{%s}$"):
        math(around.replace("%s", code), "42")
print(sum("planted" in text for text in seen))
from sympy.parsing import parse_expr
parse_expr("planted+1")
print(sum("planted" in text for text in seen))
"""


def test_math_never_hands_a_name_to_the_compiler_and_never_runs_one(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    by_math, by_parse_expr = map(int, done.stdout.split())
    assert by_math == 0
    assert by_parse_expr > 0, "the watch sees nothing"
    assert list(tmp_path.iterdir()) == []


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


def test_a_verifier_of_ones_own_has_the_limit_too(tmp_path, monkeypatch):
    (tmp_path / "my_endless_verifier.py").write_text(
        "def waits(completion, answer):\n"
        "    while completion != answer:\n"
        "        pass\n"
        "    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    reward = Correctness(find_verifier("my_endless_verifier:waits", SECONDS))
    logged = {}
    batch = {"completions": ["a", "b", "c", "a"], "answer": ["a", "a", "a", "a"]}
    start = time.monotonic()
    assert reward(["p"] * 4, **batch, log_metric=logged.__setitem__) == [1.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < 2 * CLOCK_FACTOR * SECONDS + 60
    assert logged == {"rewards/correctness/timed_out": 0.5, "rewards/correctness/failed": 0.0}
    assert reward.verifier.timeouts == 2
    assert reward(["p"], ["a"], ["a"], log_metric=logged.__setitem__) == [1.0]
    assert logged["rewards/correctness/timed_out"] == 0.0


def test_trl_logs_how_many_hit_the_limit(tmp_path, monkeypatch):
    (tmp_path / "my_broken_verifier.py").write_text("def fails(completion, answer):\n    1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = load_tokenizer("bundled")
    trainer = GRPOTrainer(
        model=tiny(tokenizer, 0),
        reward_funcs=[Correctness(TimeLimited("my_broken_verifier:fails"))],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=2,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["12@35="], "answer": ["1"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/correctness/failed"] == 1.0
    assert log["rewards/correctness/timed_out"] == 0.0
    assert log["rewards/correctness/mean"] == 0.0
