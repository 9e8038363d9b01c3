"""What a licence asks for stands in the export: its name, attribution, notice and files."""

import pytest

from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.export import hub
from pipeline.export.card import model_card, model_name, write_notices
from pipeline.export.licence import Licence, find_licence

LLAMA = Licence("llama3.2")
APACHE = Licence("apache-2.0")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("README.md", "---\nlicense: llama3.2\ntags: [a]\n---\n# Model", "llama3.2"),
        ("README.md", "---\nlicense: other\nlicense_name: Llama3.1\n---\n", "llama3.1"),
        ("README.md", "# license: mit, in the text alone", None),
        ("README.md", "---\nlicense: [broken\n---\n", None),
        ("README.md", "---\njust text\n---\n", None),
        ("LICENSE.txt", "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version", "llama3.2"),
        ("LICENSE", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("LICENSE", "   Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("LICENSE", "All rights reserved.", None),
        ("notes.txt", "Apache License\nVersion 2.0", None),
    ],
)
def test_licence_is_found_beside_the_weights(folder, name, text, found):
    (folder / name).write_text(text)
    licence = find_licence(str(folder), "student.path")
    assert licence.name == found
    copied = [folder / name] if name.startswith("LICENSE") else []
    assert list(licence.files) == copied


def test_bundled_model_is_under_our_own_licence_and_an_unreachable_one_unknown():
    assert find_licence("bundled", "student.path") == APACHE
    assert find_licence("nobody/no-model", "student.path") == Licence(None)


@pytest.mark.parametrize(
    ("name", "attribution", "prefix", "version"),
    [
        ("llama2", None, "", "2"),
        ("llama3", "Built with Meta Llama 3", "Llama-3", "3"),
        ("llama3.1", "Built with Llama", "Llama", "3.1"),
        ("llama3.3", "Built with Llama", "Llama", "3.3"),
        ("llama4", "Built with Llama", "Llama", "4"),
        ("apache-2.0", None, "", None),
        (None, None, "", None),
    ],
)
def test_what_each_licence_asks_for(name, attribution, prefix, version):
    licence = Licence(name)
    assert (licence.attribution, licence.name_prefix) == (attribution, prefix)
    assert licence.llama_version == version
    assert (licence.notice is None) == (version is None)
    if version:
        assert f"Llama {version} is licensed under the " in licence.notice


def card(base_model="meta-llama/Llama-3.2-1B", licences=(LLAMA, LLAMA)):
    return model_card(
        None,
        base_model=base_model,
        teacher="meta-llama/Llama-3.1-8B",
        licences=licences,
        made_by="prune",
        dtype="bfloat16",
        measured_dtype="float32",
        loading_lines=["model = load(path)"],
    )


def test_card_carries_licence_name_attribution_and_notice():
    text = card()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "license: llama3.2" in head.splitlines()
    assert "base_model: meta-llama/Llama-3.2-1B" in head.splitlines()
    assert body.lstrip().startswith("# Llama-3.2-1B-sparse")
    assert body.count("**Built with Llama**") == 1
    assert "Llama 3.2 Community License, Copyright (c) Meta" in body
    assert "@misc{jiang2025mama" in body


def test_card_under_other_licences():
    text = card("models/mine", (APACHE, Licence("llama3.1")))
    assert "license: apache-2.0" in text
    assert "# Llama-mine-sparse" in text
    assert "**Built with Llama**" in text  # learned from a Llama's outputs
    assert "Its teacher, meta-llama/Llama-3.1-8B, is under llama3.1." in text
    unknown = card("mine", (Licence(None), Licence(None)))
    assert "license:" not in unknown
    assert "base_model:" not in unknown
    assert "No file beside the base model names its licence" in unknown
    assert "Its teacher" not in unknown


def test_names_begin_as_the_licences_ask():
    assert model_name("a/Llama-3.2-1B", [LLAMA, LLAMA]) == "Llama-3.2-1B-sparse"
    assert model_name("bundled", [APACHE, APACHE]) == "Llama-bundled-sparse"
    assert model_name("x/tiny", [APACHE, Licence("llama3")]) == "Llama-3-tiny-sparse"


def test_files_are_copied_and_the_notice_is_written_once(folder, tmp_path_factory):
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    (folder / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT")
    (folder / "USE_POLICY.md").write_text("policy")
    (folder / "NOTICE").write_text("Made by me.\n")
    out = tmp_path_factory.mktemp("export")
    write_notices(out, [find_licence(str(folder), "student.path"), Licence("llama3.1")])
    assert (out / "LICENSE.txt").read_text() == "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"
    assert (out / "USE_POLICY.md").read_text() == "policy"
    lines = (out / "NOTICE").read_text().splitlines()
    assert lines[0] == "Made by me."
    assert [line[:30] for line in lines[1:]] == [
        "Llama 3.2 is licensed under th",
        "Llama 3.1 is licensed under th",
    ]
    (out / "config.json").write_text("{}")
    again = tmp_path_factory.mktemp("again")
    write_notices(again, [find_licence(str(out), "student.path"), LLAMA])
    assert (again / "NOTICE").read_text() == (out / "NOTICE").read_text()
    plain = tmp_path_factory.mktemp("plain")
    write_notices(plain, [APACHE, APACHE])
    assert list(plain.iterdir()) == []


def test_a_name_that_a_licence_forbids_is_refused_with_one_that_it_allows():
    with pytest.raises(UserError, match="set me/Llama-small"):
        hub.check_name("me/small", [APACHE, LLAMA])
    hub.check_name("me/Llama-small", [APACHE, LLAMA])
    hub.check_name("me/small", [APACHE, Licence("llama2")])


def test_push_goes_as_far_as_the_hub(tmp_path):
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(UserError) as caught:
        hub.push(tmp_path, "me/Llama-small")
    message = str(caught.value)
    assert message.startswith("export.push_to_hub: 'me/Llama-small': the Hub did not take it (")
    assert "offline mode" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"export.push_to_hub": "no-owner"}, "export.push_to_hub"),
        (
            {"export.push_to_hub": "me/Llama", "export.formats": ["packed"]},
            "export.push_to_hub",
        ),
        (
            {"run.stages": ["prune", "export"], "export.formats": ["semi_structured"]},
            "export.formats",
        ),
        ({"export.formats": ["gguf"]}, "export.formats"),
    ],
)
def test_bad_export_keys_are_refused(values, key):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_config(None, values)
