"""``liar families``: the table, and a proposed row, as a user sees them."""

from __future__ import annotations

import json
import shutil

import pytest

from liar_ext import cli
from liar_ext.models.registry import FAMILIES


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def folder(llama_folder, tmp_path_factory):
    """A config alone: no weights, no tokenizer."""
    path = tmp_path_factory.mktemp("models") / "config-alone"
    path.mkdir()
    shutil.copy(llama_folder / "config.json", path)
    return path


def change(folder, tmp_path, **fields):
    path = tmp_path / "changed"
    path.mkdir()
    old = json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**old, **fields}))
    return path


def test_the_table_is_printed_in_two_forms(capsys):
    code, plain, _ = run(capsys, "families")
    assert code == 0
    lines = plain.splitlines()
    heads = "family heads KV groups channels experts hidden size biases stock config layerwise"
    assert lines[0].split() == heads.split()
    assert [line.split()[0] for line in lines[1 : len(FAMILIES) + 1]] == sorted(FAMILIES)
    _, text, _ = run(capsys, "families", "--json")
    facts = json.loads(text)
    assert facts["llama"]["heads"] == {"applies": "yes", "reason": ""}


def test_a_row_is_proposed_for_a_config_alone(folder, capsys, monkeypatch):
    row = FAMILIES["llama"]
    with monkeypatch.context() as without:
        without.delitem(FAMILIES, "llama")
        code, text, said = run(capsys, "families", "--suggest", folder)
        assert code == 0 and not said
        exec(text, {})  # all of it is Python
        found = FAMILIES["llama"]
    assert found.attn.config == row.attn.config and found.mlp == row.mlp
    assert text.startswith("# llama: proposed, and proved on tiny random models\n# proved: sliced")
    assert found.stream is None and "\n# lacking: hidden: the residual stream isn't" in text


def test_a_known_family_is_said_to_be_known(folder, capsys):
    code, text, _ = run(capsys, "families", "--suggest", folder, "--json")
    facts = json.loads(text)
    assert code == 0 and facts["known"] and facts["family"] == "llama" and not facts["proved"]
    assert facts["code"].startswith("from liar_ext import register_family\n")


def test_what_cannot_be_used_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = {
        ("--suggest", tmp_path / "empty"): "holds no readable config.json",
        ("--suggest", "x/y/z"): "give a folder, a hub id or a GGUF file",
        ("--suggest", change(folder, tmp_path, model_type="mine", auto_map={"AutoModel": "a.B"})): (
            "has no architecture 'mine', and no code of"
        ),
    }
    for arguments, reason in cases.items():
        code, out, said = run(capsys, "families", *arguments)
        assert code == 2 and not out and reason in said
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


def test_a_config_that_claims_too_many_layers_is_refused(folder, tmp_path, capsys, monkeypatch):
    """Its class would make a list with an entry for each."""
    path = change(folder, tmp_path, model_type="qwen2", num_hidden_layers=10**12)
    monkeypatch.delitem(FAMILIES, "qwen2")
    code, _, said = run(capsys, "families", "--suggest", path)
    assert code == 2 and "claims 1000000000000 num_hidden_layers" in said
