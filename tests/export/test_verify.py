"""Every claim of a folder is tried in a process of its own; one test starts a real one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import change, equal_plan, read
from safetensors.torch import load_file, save_file
from tiny import tiny

from liar_ext import InputError, cli, verify_pruned
from liar_ext.checkpoint.folder import fixed_inputs, read_fingerprint, run_on
from liar_ext.export import export, onnx, verify
from liar_ext.export.verify import table, verify_everywhere
from liar_ext.export.verify_worker import timed_text

pytestmark = pytest.mark.usefixtures("quick_workers")


@pytest.fixture(scope="module")
def unequal(saved, tmp_path_factory) -> Path:
    folder = shutil.copytree(saved()[2], tmp_path_factory.mktemp("unequal") / "model")
    export(folder, "gguf", progress=False)
    export(folder, "uniform", progress=False)
    return folder


def test_loaders_and_exports_have_a_row_each(unequal: Path, capsys) -> None:
    assert cli.main(["verify", str(unequal), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["agrees"] and facts["layers"] == "unequal"
    how = [row["how"] for row in facts["rows"]]
    assert how[0] == "liar_ext.load_pruned" and "trust_remote_code=True" in how[1]
    assert how[2:] == ["gguf model.gguf", "uniform model-uniform"]
    for row in facts["rows"]:
        assert row["agrees"] and not row["error"] and row["difference"] < 1e-3
        assert row["tokens_per_second"] > 0 and row["megabytes"] > 0


def test_a_changed_export_and_a_missing_one_are_told(unequal: Path, saved, tmp_path: Path) -> None:
    other = shutil.copytree(saved("qwen2", equal_plan)[2], tmp_path / "other")
    done = export(other, "gguf", progress=False)
    record = json.loads((unequal / "liar/exports.json").read_text())
    kept = (unequal / "liar/exports.json").read_text()
    # A type in capitals is as exact.
    record["exports"][0] |= {"path": str(done.paths[0]), "options": {"quantize": "F32"}}
    record["exports"][1]["path"] = "../nowhere"
    change(unequal / "liar/exports.json", **record)
    try:
        facts = verify_everywhere(unequal)
    finally:
        (unequal / "liar/exports.json").write_text(kept)
    assert not facts["agrees"] and [row.agrees for row in facts["rows"]] == [
        True,
        True,
        False,
        False,
    ]
    lines = table(facts["rows"])
    assert "OTHER OUTPUTS" in lines[2] and "DOESN'T LOAD" in lines[3]


@pytest.mark.exhaustive
def test_an_encoder_and_its_graph(saved, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(saved("bert")[2], tmp_path / "model")
    (graph,) = export(tmp_path / "model", "onnx", progress=False).paths
    monkeypatch.setattr(onnx, "write_graph", lambda _, to: shutil.copy(graph / onnx.FILE, to))
    export(tmp_path / "model", "onnx", tmp_path / "small", progress=False, quantize="int8")
    facts = verify_everywhere(tmp_path / "model")
    exact, quantised = facts["rows"][-2:]
    assert facts["agrees"] and (exact.how, quantised.how) == (
        "onnx model-onnx",
        "onnx small (int8)",
    )
    assert exact.difference < 1e-4 < quantised.difference
    assert "loads, quantised" in table(facts["rows"])[-1]


def test_other_weights_are_found_by_every_loader(saved, tmp_path: Path, capsys) -> None:
    shutil.copytree(saved("llama", equal_plan)[2], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    assert cli.main(["verify", str(tmp_path / "model"), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["agrees"] and not any(row["agrees"] for row in facts["rows"])
    assert all(row["difference"] > 1e-2 for row in facts["rows"])


def test_weights_that_the_recorded_input_does_not_use_are_compared(saved, tmp_path, capsys) -> None:
    folder = shutil.copytree(saved("qwen2", equal_plan)[2], tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "blob")  # as in the cache of a hub
    weights.symlink_to(tmp_path / "blob")
    assert verify_pruned(folder)["agrees"]
    tensors = load_file(weights)
    rows = tensors["model.embed_tokens.weight"]
    used = read_fingerprint(folder).inputs["input_ids"]
    rows[~torch.isin(torch.arange(len(rows)), used)] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    found = verify_pruned(folder)
    assert found["loaders"] and all(each["agrees"] for each in found["loaders"].values())
    assert not found["agrees"] and found["changed"] == ["model.safetensors"]
    assert cli.main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out.endswith("model.safetensors: CHANGED since it was saved\n")


@pytest.mark.parametrize("name", ["roberta", "mpnet"])
def test_positions_of_padding_are_not_read(name, saved) -> None:
    facts = verify_everywhere(saved(name)[2])
    assert facts["agrees"] and all(row.tokens_per_second > 0 for row in facts["rows"])
    model = tiny(name, max_position_embeddings=10)
    inputs = fixed_inputs(model)
    assert 0 < inputs["input_ids"].shape[1] < 10 and run_on(model, inputs).isfinite().all()


@pytest.mark.parametrize("most, count", [(None, 128), (514, 128), (129, 16)])
def test_a_text_to_be_timed_has_the_positions_of_the_model(most, count) -> None:
    assert timed_text(np.ones((1, 16), dtype=int), most).shape == (1, count)


def test_all_that_towers_read_is_given_to_every_loader(saved) -> None:
    facts, here = (check(saved("clip")[2]) for check in (verify_everywhere, verify_pruned))
    assert facts["agrees"] and here["agrees"]
    assert [row.how for row in facts["rows"]] == list(here["loaders"])


def test_a_record_of_an_export_that_cannot_be_is_told(saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved("clip")[2], tmp_path / "model")
    (folder / "model.gguf").touch()
    entry = {"format": "gguf", "path": "model.gguf"}
    record = {"version": 1, "exports": [entry]}
    (folder / "liar/exports.json").write_text(json.dumps(record))
    (row,) = verify._exports(folder, read_fingerprint(folder), None)
    assert not row.agrees and "llama.cpp can't run model.gguf" in row.error


def test_code_of_a_stranger_is_not_run(saved, tmp_path: Path) -> None:
    shutil.copytree(saved()[2], tmp_path / "model")
    loader = tmp_path / "model" / "liar_loader.py"
    loader.write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n" + loader.read_text())
    with pytest.raises(InputError, match="liar_loader.py, which save_pruned didn't write"):
        verify_everywhere(tmp_path / "model")
    assert not (tmp_path / "PWNED").exists() and read(tmp_path / "model")["auto_map"]


def test_a_loader_that_fails_takes_no_other_with_it(
    unequal: Path, tmp_path: Path, monkeypatch
) -> None:
    """Each row is of a process of its own; the last two say what they would by themselves.

    None imports a file of the current folder, also where an empty entry of PYTHONPATH stands for
    that folder.
    """
    monkeypatch.setattr(verify, "subprocess", subprocess)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":")
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n")
    job = verify._job(unequal, "cpu", "AutoModelForCausalLM", True)
    changes = [{"loader": "NoSuchModel"}, {"fingerprint": "/nowhere"}, {}, {"loader": "liar_ext"}]
    jobs = {str(index): job | change for index, change in enumerate(changes)}
    rows = verify._loaded(jobs, read_fingerprint(unequal), 1.0)
    assert [row.how for row in rows] == list(jobs)
    assert "NoSuchModel" in rows[0].error and "/nowhere" in rows[1].error
    assert all(row.agrees and not row.error for row in rows[2:])
    monkeypatch.setattr(verify, "WORKER", Path("/nowhere.py"))
    assert "nowhere.py" in verify._answers([job] * 2)[1]["error"]
    assert not (tmp_path / "PWNED").exists()
