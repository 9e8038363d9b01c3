"""The config: what is accepted, what is refused, and that the message says how to mend it."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipeline import trl_keys
from pipeline.config import Config, ConfigError, PruneConfig, ScoreParts, sweep_row
from pipeline.config_keys import describe_keys, nearest_keys, own_fields
from pipeline.config_loading import load_config, to_yaml
from pipeline.config_yaml import parse_yaml
from pipeline.errors import UserError

TRL_SECTIONS = ("distill", "on_policy", "grpo")
STEPS = {"distill.max_steps": 9, "grpo.max_steps": 9}  # all that has no default


def load(overrides):
    """Loads a config from the defaults."""
    return load_config(None, STEPS | overrides)


def load_text(tmp_path, text, **overrides):
    """Loads a config without training stages, which ask for nothing, from YAML text."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, {"run.stages": ["prune", "evaluate"]} | overrides)


def faults_of(call):
    """The lines of the message that a call raises, without the heading."""
    with pytest.raises(ConfigError) as caught:
        call()
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def only_fault(overrides):
    """The one line that overrides lead to."""
    (line,) = faults_of(lambda: load(overrides))
    return line


# What is accepted.


def test_defaults_are_valid_and_frozen():
    config = load_config(None, {"run.stages": ["evaluate"]})
    assert config.model_copy(update={"run": Config().run}) == Config()
    config = load({})
    assert config.run.stages == ["prune", "distill", "grpo", "evaluate"]
    assert (config.prune.method, config.prune.sparsity) == ("mama", 0.9)
    with pytest.raises(ValidationError):
        config.prune.sparsity = 0.5


def test_overrides_win_over_the_file_and_reach_nested_keys(tmp_path):
    config = load_text(
        tmp_path,
        "prune: {sparsity: 0.5, scope: model}\ngrpo: {max_steps: 3}\n",
        **{
            "prune.sparsity": 0.7,
            "prune.score_parts.movement": False,
            "grpo.generation_kwargs.top_k": 5,
        },
    )
    assert (config.prune.sparsity, config.prune.scope) == (0.7, "model")
    assert not config.prune.score_parts.movement
    assert config.prune.score_parts.activation
    assert config.grpo.trl_values == {"max_steps": 3, "generation_kwargs": {"top_k": 5}}


def test_an_empty_section_means_its_defaults(tmp_path):
    assert load_text(tmp_path, "prune:\ngrpo:\n") == load_text(tmp_path, "task: {}\n")
    assert load_text(tmp_path, "prune:\n", **{"prune.sparsity": 0.1}).prune.sparsity == 0.1


def test_sections_that_share_an_anchor_stay_apart(tmp_path):
    text = "distill: &both {max_steps: 3, max_step: 1}\ngrpo: *both\n"
    assert len(faults_of(lambda: load_text(tmp_path, text))) == 2
    config = load_text(
        tmp_path,
        "distill: &both {max_steps: 3}\ngrpo:\n  <<: *both\n  learning_rate: 1e-3\n",
        **{"grpo.max_steps": 7},
    )
    assert config.distill.trl_values == {"max_steps": 3}
    assert config.grpo.trl_values == {"max_steps": 7, "learning_rate": 1e-3}


def test_own_distill_keys_are_not_handed_to_trl():
    config = load({"distill.rollouts": 5, "distill.max_steps": 2})
    assert config.distill.rollouts == 5
    assert config.distill.trl_values == {"max_steps": 2}


# YAML.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2.", -2.0),
        (".5", 0.5),
        ("3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed, _ = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_scientific_notation_is_a_float_in_a_config(tmp_path):
    config = load_text(tmp_path, "grpo: {learning_rate: 1e-3}\nmovement: {half_life_steps: 1e2}\n")
    assert config.grpo.trl_values["learning_rate"] == 0.001
    assert config.movement.half_life_steps == 100.0


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path):
    text = "run: {seed: 1}\nprune:\n  sparsity: 0.5\n  scope: matrix\n  sparsity: 2\nrun: {}\n"
    lines = faults_of(lambda: load_text(tmp_path, text))
    assert lines[0].startswith("line 5: sparsity: given twice in one mapping, first on line 3;")
    assert lines[1].startswith("line 6: run: given twice in one mapping, first on line 1;")
    assert lines[2].startswith("prune.sparsity: 2: must be less than 1;")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prune: {sparsity: 0.5\nrun: {}\n", "line 2, column 4"),
        (b"a: b: c", "line 1, column 5: mapping values are not allowed here"),
        (b"", "holds nothing"),
        (b"# only a comment\n", "holds nothing"),
        (b"- prune\n- grpo\n", "[prune, grpo] is no section"),
        (b"0.9", "0.9 is no section"),
        (b"\x80\x02}q\x00.", "not text"),
        (b"PK\x03\x04\x00\x00", "not allowed"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"x: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        (b"grpo: &a {generation_kwargs: *a}\n", "recursive"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_config_gives_one_short_message(tmp_path, content, said):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    message = str(caught.value)
    assert message.startswith(f"--config: {path}: ")
    assert said in message
    assert len(message.splitlines()) == 1
    assert "; " in message


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "grpo_70.yaml").write_text("run: {seed: 1}")
    with pytest.raises(ConfigError, match=r"no such file; give .*grpo_70\.yaml instead"):
        load_config(tmp_path / "grpo70.yaml", {})
    with pytest.raises(ConfigError, match="Is a directory; give a YAML file"):
        load_config(tmp_path, {})


# Writing and reading back.

PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
YAML_LIKE = st.sampled_from(
    ["1e-3", "no", "null", "~", "", "0o7", "<<", "=", "010", "true", "2024-01-01", "- a", "a: b"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | PLAIN_TEXT | YAML_LIKE
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(PLAIN_TEXT | YAML_LIKE, inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    instruction=PLAIN_TEXT | YAML_LIKE,
    sparsity=st.floats(0, 1, exclude_max=True),
    learning_rate=st.floats(0, 1),
    kwargs=st.dictionaries(PLAIN_TEXT | YAML_LIKE, VALUES, max_size=3),
)
def test_a_written_config_reads_back_equal(
    tmp_path_factory, instruction, sparsity, learning_rate, kwargs
):
    config = load(
        {
            "task.instruction": instruction,
            "prune.sparsity": sparsity,
            "grpo.learning_rate": learning_rate,
            "grpo.generation_kwargs": kwargs,
        },
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    again = load_config(path, {})
    assert again == config
    assert again.grpo.trl_values["generation_kwargs"] == kwargs


# Unknown keys.


@pytest.mark.parametrize("section", list(Config.model_fields))
def test_a_misspelt_key_names_the_nearest_one(section):
    own = Config.model_fields[section].annotation.model_fields
    name = max((own or ["max_completion_length"]), key=len)
    misspelt = name[:2] + name[3:]
    line = only_fault({f"{section}.{misspelt}": "x"})
    assert line == f"{section}.{misspelt}: x: unknown key; set {section}.{name} instead"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("gpro", ["grpo"]),
        ("sparsity", ["prune.sparsity"]),
        ("refine.sparsity", ["refine.start_sparsity", "prune.sparsity"]),
        ("teacher.batch_size", ["teacher.micro_batch_size", "calibration.batch_size"]),
        ("distill.learning_rat", ["distill.learning_rate"]),
        ("grpo.learning_rat", ["grpo.learning_rate"]),
        ("prune.score_parts.activations", ["prune.score_parts.activation"]),
        ("prune.xyzzy", []),
    ],
)
def test_nearest_keys(key, nearest):
    assert nearest_keys(key) == nearest


def test_a_refused_key_is_never_suggested():
    for section in TRL_SECTIONS:
        for key in trl_keys.REFUSED[section]:
            assert f"{section}.{key}" not in nearest_keys(f"{section}.{key}x")


def test_a_key_that_is_no_text_is_unknown(tmp_path):
    lines = faults_of(lambda: load_text(tmp_path, "1: 3\ngrpo: {true: 2}\nrun: {~: 2}\n"))
    assert lines == [
        "1: 3: unknown key; --help lists the keys",
        "grpo.True: 2: unknown key; --help lists the keys",
        "run.None: 2: unknown key; --help lists the keys",
    ]


# Wrong values of our own keys.


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("prune.sparsity", 1, "must be less than 1; set float >= 0 and < 1 instead"),
        ("prune.sparsity", -0.1, "must be greater than or equal to 0"),
        ("prune.sparsity", "0.9", "'0.9': must be a valid number"),
        ("prune.sparsity", math.nan, ".nan: must be "),
        ("prune.sparsity", True, "true: must be a valid number"),
        ("movement.half_life_steps", math.inf, ".inf: must be a finite number"),
        ("run.seed", 1.0, "1.0: must be a valid integer; set int >= 0"),
        ("run.seed", True, "true: must be a valid integer"),
        ("run.seed", None, "null: must be a valid integer"),
        ("student.trust_remote_code", "yes", "must be a valid boolean; set true or false instead"),
        ("student.path", "", "must have at least 1 character; set non-empty string instead"),
        ("student.revision", 7, "7: must be a valid string; set string or null instead"),
        ("prune.method", "magnitud", "set magnitude instead"),
        ("prune.scope", 3, "3: must be a valid string; set string or null instead"),
        ("prune.scope", "rows", "not N:M with 0 < N < M; set row instead"),
        ("prune.scope", "4:2", "set matrix, model, row or N:M such as 2:4 instead"),
        ("prune.scope", "0:4", "set matrix, model, row or N:M such as 2:4 instead"),
        ("run.stages", [], "must have at least 1 item"),
        ("run.stages", "grpo", "must be a valid list"),
        ("run.stages", ["grpo", "prune"], "each once; set [prune, grpo] instead"),
        ("run.stages", ["grpo", "grpo"], "set [grpo] instead"),
        ("refine.stages", ["distil"], "refine.stages[0]: distil: must be"),
        ("task.verifier", "gsm8", "set gsm8k instead"),
        ("task.verifier", "module.function", "set exact or numeric or gsm8k or math instead"),
        ("rewards.functions", ["corectness"], "set correctness instead"),
        ("rewards.weights", [1, "x"], "rewards.weights[1]: x: must be a valid number"),
        ("prune.score_parts", True, "not keys with values; write score_parts.KEY: VALUE"),
        ("grpo", 5, "grpo: 5: not keys with values; write grpo.KEY: VALUE"),
    ],
)
def test_a_wrong_value_is_echoed_with_reason_and_remedy(key, value, line):
    found = only_fault({key: value})
    assert found.startswith(key)
    assert line in found


def test_dotted_names_and_numbers_that_are_ints_are_accepted():
    config = load(
        {
            "task.verifier": "my.module:check",
            "rewards.functions": ["correctness", "shape:reward"],
            "rewards.weights": [1, 0.5],
            "prune.sparsity": 0,
            "distill.ce_weight": 1,
        },
    )
    assert config.rewards.weights == [1.0, 0.5]
    assert config.prune.sparsity == 0


def test_an_override_below_a_value_is_refused(tmp_path):
    lines = faults_of(
        lambda: load_text(tmp_path, "prune: {sparsity: 0.5}", **{"prune.sparsity.x": 3})
    )
    assert lines == ["prune.sparsity.x: 3: prune.sparsity holds no keys; leave it out"]


def test_all_faults_are_reported_together(tmp_path):
    text = """
prune: {sparcity: 0.9, method: best}
grpo: {output_dir: here, max_steps: ten, learning_rat: 1}
refine: {begin_step: 5, end_step: 5}
evaluate: {batch_size: 0}
rewards: {weights: [1, 2]}
"""
    lines = faults_of(lambda: load_text(tmp_path, text, **{"task.num_probe": -1}))
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        [
            "prune.sparcity",
            "prune.method",
            "grpo.output_dir",
            "grpo.max_steps",
            "grpo.learning_rat",
            "refine.end_step",
            "evaluate.batch_size",
            "rewards.weights",
            "task.num_probe",
        ]
    )
    for line in lines:
        assert re.fullmatch(r"[\w.]+: .+: .+; .+", line)


def test_a_rule_is_not_applied_to_a_key_that_is_faulty_itself():
    overrides = {"prune.sparsity": 1.5, "refine.start_sparsity": 0.95}
    assert only_fault(overrides).startswith("prune.sparsity: 1.5")
    overrides = {"prune.sparcity": 0.97, "refine.start_sparsity": 0.95}
    assert only_fault(overrides).startswith("prune.sparcity: 0.97")


# Rules between keys.

LORA = {"lora.r": 4, "movement.kept": "displacement"}


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        ({"rewards.weights": [1, 1]}, "rewards.weights", "set 1 of them, or null"),
        ({"refine.begin_step": 9, "refine.end_step": 9}, "refine.end_step", "set 10 or more"),
        ({"refine.start_sparsity": 0.95}, "refine.start_sparsity", "set 0.9 or less"),
        ({"refine.start_sparsity": 0.1, "refine.stages": []}, "refine.stages", "[distill, grpo]"),
        ({"evaluate.patience": 3}, "evaluate.patience", "set evaluate.every_steps to a number"),
        (
            {"run.stages": ["prune", "on_policy"], "refine.stages": ["on_policy"]},
            "on_policy.max_steps",
            "set 1 or more",
        ),
        ({"refine.scope": "model", "refine.min_density": 0.2}, "refine.min_density", "0.1 or less"),
        ({"student.dtype": "bfloat16"}, "student.dtype", "set float32, and grpo.bf16: true"),
        ({"distill.kl_weight": 0}, "distill.kl_weight", "above 0"),
        ({"distill.max_steps": -1}, "distill.max_steps", "set 1 or more"),
        ({"grpo.max_steps": 0}, "grpo.max_steps", "set 1 or more"),
        (
            {"rewards.teacher_kl_weight": 0.1, "grpo.loss_type": "vespo"},
            "grpo.loss_type",
            "set dapo",
        ),
        (
            {"rewards.teacher_kl_weight": 0.1, "grpo.loss_type": "luspo"},
            "grpo.loss_type",
            "set dapo",
        ),
        (
            {"rewards.teacher_kl_weight": 0.1, "grpo.importance_sampling_level": "sequence"},
            "grpo.importance_sampling_level",
            "set token",
        ),
        ({"prune.scope": "2:4"}, "prune.sparsity", "keeps 2 of every 4 weights; set 0.5 instead"),
        (
            {"prune.scope": "2:4", "prune.sparsity": 0.5, "refine.start_sparsity": 0.0},
            "refine.start_sparsity",
            "set null",
        ),
        (
            {"prune.scope": "2:4", "prune.sparsity": 0.5, "refine.regrow_fraction": 0.1},
            "refine.regrow_fraction",
            "set 0",
        ),
        (
            {"distill.muon_learning_rate": 0.01, "refine.regrow_fraction": 0.1},
            "movement.pruned",
            "set negative_gradient",
        ),
        (
            {"distill.muon_learning_rate": 0.01, "refine.score": "fisher"},
            "refine.score",
            "kept: squared",
        ),
        ({"prune.method": "sparsegpt", "prune.scope": "model"}, "prune.scope", "set matrix, row"),
        (
            {"prune.method": "sparsegpt", "prune.redistribution": "proportional"},
            "prune.redistribution",
            "set none, or least_squares",
        ),
        ({"prune.method": "sdmprune", "prune.scope": "row"}, "prune.scope", "set null"),
        (
            {"prune.method": "sdmprune", "refine.regrow_fraction": 0.1},
            "refine.regrow_fraction",
            "set",
        ),
        ({"prune.method": "block_entropy", "refine.score": "mix"}, "refine.score", "magnitude"),
        ({"prune.method": "sdmprune", "prune.allocation": "owl"}, "prune.allocation", "uniform"),
        ({"prune.scope": "model", "prune.allocation": "owl"}, "prune.allocation", "set uniform"),
        (
            {"prune.scope": "2:4", "prune.sparsity": 0.5, "prune.allocation": "search"},
            "prune.allocation",
            "set uniform",
        ),
        (
            {"prune.allocation": "owl", "refine.start_sparsity": 0.5},
            "refine.scope",
            "set model, or refine.stages: []",
        ),
        (
            {
                "prune.score_parts.magnitude": False,
                "prune.score_parts.activation": False,
                "prune.score_parts.movement": False,
            },
            "prune.score_parts",
            "set one of magnitude",
        ),
        (
            {"prune.method": "random", "prune.redistribution": "admm"},
            "prune.redistribution",
            "set least_squares or none",
        ),
        (
            {"prune.scope": "model", "prune.redistribution": "admm"},
            "prune.redistribution",
            "set least_squares, or another prune.scope",
        ),
        (
            {"prune.redistribution": "admm", "prune.score_parts.magnitude": False},
            "prune.score_parts.magnitude",
            "set true",
        ),
        ({"rewards.functions": ["format"]}, "rewards.format_pattern", "set a regular expression"),
        ({"rewards.format_pattern": "a"}, "rewards.format_pattern", "set null, or add format"),
        (
            {"rewards.functions": ["format"], "rewards.format_pattern": "(a"},
            "rewards.format_pattern",
            "mend it",
        ),
        (
            {"rewards.functions": ["format"], "rewards.format_pattern": "a{99999999999}"},
            "rewards.format_pattern",
            "mend it",
        ),
        ({"rewards.teacher_kl_top_k": 8}, "rewards.teacher_kl_top_k", "set null"),
        (
            {"rewards.teacher_kl_direction": "reverse", "rewards.teacher_kl_place": "reward"},
            "rewards.teacher_kl_direction",
            "set forward",
        ),
        ({"refine.verify": True}, "refine.verify", "set false, or refine.start_sparsity"),
        ({"calibration.source": "text"}, "calibration.text_path", "set a text file"),
        ({"evaluate.text_seq_len": 64}, "evaluate.text_stride", "set 64 or less"),
        (
            {"evaluate.sampled_completions": 4, "evaluate.pass_at_k": [1, 8]},
            "evaluate.pass_at_k",
            "set 4 or less",
        ),
        ({"lora.r": 4}, "movement.kept", "set displacement, or lora.r: null"),
        (LORA | {"movement.pruned": "negative_gradient"}, "movement.pruned", "set proposed"),
        (LORA | {"refine.score": "fisher"}, "refine.score", "set magnitude"),
        (LORA | {"distill.muon_learning_rate": 0.01}, "distill.muon_learning_rate", "set null"),
        (LORA | {"grpo.use_vllm": True}, "grpo.use_vllm", "set false"),
        (
            LORA | {"run.stages": ["prune", "on_policy"], "on_policy.max_steps": 9},
            "run.stages",
            "leave on_policy out",
        ),
        (LORA | {"grpo.num_masks": 2, "refine.start_sparsity": 0.5}, "grpo.num_masks", "set 1"),
        (LORA | {"refine.verify": True, "refine.regrow_fraction": 0.1}, "refine.verify", "false"),
    ],
)
def test_keys_that_do_not_fit_together(overrides, key, remedy):
    line = only_fault(overrides)
    assert line.startswith(f"{key}: ")
    assert remedy in line


@pytest.mark.parametrize(
    "overrides",
    [
        {"student.dtype": "bfloat16", "run.stages": ["prune", "evaluate"]},
        {"teacher.dtype": "bfloat16"},
        {"grpo.loss_type": "luspo"},
        {"grpo.importance_sampling_level": "sequence"},
        {"rewards.teacher_kl_weight": 0.1, "grpo.loss_type": "grpo", "grpo.beta": 0.04},
        {"refine.start_sparsity": 0.9},
        {"refine.start_sparsity": 0.0, "refine.end_step": 1},
        {"refine.start_sparsity": 0.0, "refine.verify": True},
        {"refine.stages": []},
        {"evaluate.patience": 3, "evaluate.every_steps": 50},
        {"refine.stages": ["grpo"], "distill.max_steps": -1},
        {"distill.kl_weight": 0, "distill.ce_weight": 1},
        {"prune.sparsity": 0.999},
        {"rewards.teacher_kl_top_k": 8, "rewards.teacher_kl_place": "loss"},
        {
            "rewards.teacher_kl_weight": 0.1,
            "rewards.teacher_kl_place": "reward",
            "grpo.loss_type": "luspo",
        },
        {"rewards.functions": ["correctness", "format"], "rewards.format_pattern": "#### \\d+$"},
        {"prune.scope": "2:4", "prune.sparsity": 0.5, "refine.start_sparsity": 0.5},
        {"prune.scope": "1:3", "prune.sparsity": 0.666667},
        {"prune.method": "sparsegpt", "prune.scope": "row"},
        {"prune.method": "sparsegpt", "prune.redistribution": "none"},
        {"prune.method": "sdmprune", "prune.redistribution": "least_squares"},
        {"prune.allocation": "search"},
        LORA | {"refine.score": "mix", "grpo.use_vllm": False, "grpo.beta": 0.04},
        {"prune.allocation": "owl", "refine.start_sparsity": 0.5, "refine.scope": "model"},
        {
            "prune.allocation": "owl",
            "refine.start_sparsity": 0.5,
            "refine.stages": ["grpo"],
            "run.stages": ["prune", "distill", "evaluate"],
        },
    ],
)
def test_keys_that_fit_together(overrides):
    load(overrides)


SWEEP = {"run.stages": ["sweep"], "sweep.rows": {"a": {}, "b": {"method": "wanda"}}}


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        ({"run.stages": ["prune", "sweep"]}, "run.stages", "set [sweep]"),
        (LORA | {"sweep.recover_levels": [0.5]}, "sweep.recover_levels", "or lora.r: null"),
        ({"evaluate.zero_shot": ["piqa"]}, "evaluate.zero_shot", "set []"),
        ({"evaluate.sampled_completions": 4}, "evaluate.sampled_completions", "set null"),
        ({"sweep.rows": {}}, "sweep.rows", "configs/sweep.yaml"),
        ({"sweep.rows": {"a": {"methods": "mama"}}}, "sweep.rows.a.methods", "--help"),
        ({"sweep.rows": {"a": {"method": "best"}}}, "sweep.rows.a.method", "--help"),
        ({"sweep.rows": {"a": 5}}, "sweep.rows[a]", "set mapping"),
        (
            {"sweep.rows": {"a": {"method": "sparsegpt", "scope": "model"}}},
            "sweep.rows.a.scope",
            "set matrix",
        ),
        (
            {"sweep.rows": {"a": {"redistribution": "admm", "score_parts": {"magnitude": False}}}},
            "sweep.rows.a.score_parts.magnitude",
            "set true",
        ),
        (
            {"sweep.rows": {"a": {"score_parts": dict.fromkeys(ScoreParts.model_fields, False)}}},
            "sweep.rows.a.score_parts",
            "set one of magnitude",
        ),
        ({"sweep.rows": {"a": {"sparsity": 0.3}}}, "sweep.rows.a.sparsity", "set sweep.levels"),
        (
            {"sweep.rows": {"a": {"scope": "2:4"}}, "sweep.levels": [0.7]},
            "sweep.levels",
            "0.5 for 2:4",
        ),
        ({"sweep.levels": [0.5, 0.7, 0.5]}, "sweep.levels", "set each once"),
        ({"sweep.seeds": [1, 1]}, "sweep.seeds", "set each once"),
        ({"sweep.levels": [0.5, 1.0]}, "sweep.levels[1]", "set non-empty list"),
        ({"sweep.headline": "c"}, "sweep.headline", "set one of a, b"),
        ({"sweep.recover_levels": [0.3]}, "sweep.recover_levels", "add them"),
        (
            {"sweep.recover_levels": [0.5], "distill.max_steps": -1},
            "distill.max_steps",
            "set 1 or more",
        ),
    ],
)
def test_sweeps_that_cannot_run(overrides, key, remedy):
    line = only_fault(SWEEP | overrides)
    assert line.startswith(f"{key}: ")
    assert remedy in line


def test_a_row_changes_what_it_names():
    config = load(SWEEP | {"prune.redistribution": "none", "prune.sparsity": 0.3})
    row = sweep_row(config, "b", 0.7)
    assert (row.method, row.sparsity, row.redistribution) == ("wanda", 0.7, "none")
    assert sweep_row(config, "a") == config.prune


# TRL's keys.


@pytest.fixture(scope="module")
def trl_classes():
    """The classes themselves: the reference for what was read from their source."""
    import trl

    return {
        "distill": trl.SFTConfig,
        "on_policy": trl.DistillationConfig,
        "grpo": trl.GRPOConfig,
    }


@pytest.mark.parametrize("section", TRL_SECTIONS)
def test_names_read_from_source_are_the_fields_of_the_class(section, trl_classes):
    fields = {field.name for field in dataclasses.fields(trl_classes[section]) if field.init}
    assert set(trl_keys.trl_fields(section)) == fields
    assert set(trl_keys.REFUSED[section]) - {"overwrite_output_dir"} <= fields


@pytest.mark.parametrize("section", TRL_SECTIONS)
def test_every_default_of_trl_passes_the_type_check(section, trl_classes):
    settable, checked = trl_keys.settable_keys(section), 0
    for field in dataclasses.fields(trl_classes[section]):
        if field.name in settable and field.default is not dataclasses.MISSING:
            assert trl_keys.trl_value_fault(section, field.name, field.default) is None, field.name
            checked += trl_keys.trl_fields(section)[field.name] is not None
    assert checked > 80


@pytest.mark.parametrize("section", TRL_SECTIONS)
def test_trl_names_collide_neither_with_ours_nor_with_pydantic(section):
    own = set(Config.model_fields[section].annotation.model_fields)
    for name in trl_keys.settable_keys(section):
        assert name not in own
        assert not hasattr(BaseModel, name)


@pytest.mark.parametrize("section", TRL_SECTIONS)
def test_trl_keys_are_accepted_in_every_such_section(section):
    assert len(trl_keys.settable_keys(section)) > 90
    given_values = {
        "learning_rate": 1,
        "max_steps": 10,
        "bf16": None,
        "warmup_steps": 0.1,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "report_to": ["tensorboard"],
        "save_strategy": "no",
        "save_total_limit": 2,
        "use_cpu": True,
        "max_grad_norm": math.inf,
    }
    config = load({f"{section}.{name}": value for name, value in given_values.items()})
    assert getattr(config, section).trl_values == given_values


@pytest.mark.parametrize(
    ("section", "key"),
    [(section, key) for section in TRL_SECTIONS for key in trl_keys.REFUSED[section]],
)
def test_a_key_the_pipeline_owns_is_refused_with_the_reason(section, key):
    line = only_fault({f"{section}.{key}": "s3cret"})
    why, remedy = trl_keys.REFUSED[section][key]
    shown = "(not shown)" if key == "hub_token" else "s3cret"
    assert line == f"{section}.{key}: {shown}: the pipeline owns this key: {why}; {remedy}"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("learning_rate", "1e-3", "a float"),
        ("learning_rate", math.nan, "a float"),
        ("learning_rate", True, "a float"),
        ("max_steps", 10.0, "an int"),
        ("max_steps", None, "an int"),
        ("max_steps", True, "an int"),
        ("tf32", "yes", "true or false or null"),
        ("tf32", 1, "true or false or null"),
        ("generation_kwargs", [1], "a string or a mapping or null"),
        ("num_generations", [4], "an int or null"),
    ],
)
def test_a_trl_value_of_another_type_is_refused(key, value, wanted):
    assert f": must be {wanted}; set {wanted} instead" in only_fault({f"grpo.{key}": value})


@pytest.mark.parametrize("value", [True, False, "batch"])
def test_scale_rewards_takes_what_trl_converts(value):
    assert load({"grpo.scale_rewards": value}).grpo.scale_rewards == value


@pytest.mark.parametrize("value", [1, 0, -1])
def test_one_checkpoint_is_too_few(value):
    assert "set 2 or more, or null, instead" in only_fault({"grpo.save_total_limit": value})


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("save_strategy", "best", "set steps instead"),
        ("train_sampling_strategy", "group_by_length", "set random or sequential instead"),
    ],
)
def test_what_a_resumed_run_could_not_honour_is_refused(key, value, remedy):
    assert remedy in only_fault({f"distill.{key}": value})


def test_another_trl_than_expected_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(trl_keys._SOURCES, "grpo", (("trl", "trainer/moved.py", "GRPOConfig"),))
    trl_keys.trl_fields.cache_clear()
    with pytest.raises(UserError, match=r"trl 1\.\d+.*: no class GRPOConfig in .*moved\.py"):
        load({"grpo.max_steps": 1})
    monkeypatch.setitem(trl_keys._SOURCES, "grpo", (("trl_absent", "a.py", "GRPOConfig"),))
    with pytest.raises(UserError, match="trl_absent is not installed"):
        load({"grpo.max_steps": 1})
    monkeypatch.undo()
    trl_keys.trl_fields.cache_clear()


# The manual.


def test_every_key_is_described_and_its_default_is_yaml():
    described = describe_keys()
    assert len(described) == len(own_fields()) > 45
    defaults = {}
    for entry in described:
        assert entry.docstring.endswith("."), entry.key
        assert entry.type
        defaults[entry.key], _ = parse_yaml(entry.default)
    assert load(defaults) == load({})


def test_types_in_words():
    words = {entry.key: entry.type for entry in describe_keys()}
    assert words["prune.sparsity"] == "float >= 0 and < 1"
    assert words["refine.start_sparsity"] == "float >= 0 and < 1 or null"
    assert words["rewards.weights"] == "list of float or null"
    assert words["refine.scope"] == "matrix or model or row"
    assert words["prune.scope"] == "string or null"


def test_a_config_built_directly_checks_its_keys():
    with pytest.raises(ValidationError):
        PruneConfig(sparsity=1.0)
