"""Commands read images with text where a model sees: lines of a file, or captioned pictures."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from calibration.test_media import write_pictures
from command import run
from covers import some
from folders import zero_removed
from seeing import SEEING, read_by, seeing_model, seeing_processor, write_examples
from tiny import outputs
from transformers import AutoModelForImageTextToText, AutoProcessor

from liar_ext import apply_plan, perplexity, prune
from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.image_text import ImageTextReader, read_examples
from liar_ext.calibration.media import IMAGES_WITH_TEXT, calibration_inputs, evaluation_inputs
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.readers import kind_of

QUICK = ("--samples", 8, "--keep", 0.5, "--schedule", "one-pass", "--self-text", 0, "--quiet")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Pictures with text in folders, and a folder of each kind of model with its processor."""
    at = tmp_path_factory.mktemp("examples")
    write_examples(at / "calibration", 10)
    write_examples(at / "held_out", 4, seed=1)
    return at


@pytest.fixture(scope="module")
def dense(examples):
    """Return the folder of a kind."""

    def folder(name: str):
        path = examples / name
        if not path.exists():
            processor = seeing_processor(name)
            seeing_model(name).save_pretrained(path)
            processor.save_pretrained(path)
        return path

    return folder


def paths(examples) -> tuple:
    named = {name: examples / name / "examples.jsonl" for name in ("calibration", "held_out")}
    return "--calibration", named["calibration"], "--eval", named["held_out"]


@pytest.mark.parametrize("name", SEEING)
def test_a_job_is_that_of_batches_made_by_hand(name, examples, dense, tmp_path, capsys):
    text = paths(examples)
    assert run("prune", dense(name), *text, *QUICK, "--out", tmp_path / "small") == 0
    model, _ = load_model(dense(name))
    reader = ImageTextReader(model, seeing_processor(name))
    drawn = calibration_inputs([read_examples(text[1])], reader, samples=8)
    assert len(drawn) == 8 and any("pixel_values" in each for each in drawn.batches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so little text
        report = prune(model, drawn.batches(), keep=0.5, schedule="one-pass")
    small, _ = load_model(tmp_path / "small")
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], expected)
    said = json.loads((tmp_path / "small/liar/report.json").read_text())
    held_out = read_by(small, name, text[3]).batches()
    expected = perplexity(small, held_out)
    assert said["evaluation"]["pruned"] == pytest.approx(expected, rel=1e-4)
    capsys.readouterr()
    assert run("eval", tmp_path / "small", "--text", text[3], "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected, rel=1e-4)
    # Sliced is zeroed, on images.
    whole, plan = seeing_model(name).double(), report.plan
    zeroed = zero_removed(whole, plan)
    apply_plan(whole, plan)
    for batch in read_batches(read_by(whole, name, text[3]).batches()):
        expected = outputs(zeroed, batch.inputs)
        torch.testing.assert_close(outputs(whole, batch.inputs), expected)


@some("name", SEEING, "llava")
def test_a_folder_loads_and_writes(name, examples, dense, tmp_path):
    options = (*QUICK, "--uniform-layers", "--tile", 1)
    assert run("prune", dense(name), *paths(examples), *options, "--out", tmp_path / "one") == 0
    ours, _ = load_model(tmp_path / "one")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    reader = ImageTextReader(model, AutoProcessor.from_pretrained(tmp_path / "one"))
    held_out = evaluation_inputs(read_examples(paths(examples)[3]), reader, samples=1)
    (batch,) = read_batches(held_out.batches())
    assert torch.equal(outputs(model, batch.inputs), outputs(ours, batch.inputs))
    written = model.generate(**batch.inputs, max_new_tokens=3, min_new_tokens=3)
    assert written.shape[1] == batch.inputs["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path / "two")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "two")
    assert torch.equal(outputs(again, batch.inputs), outputs(ours, batch.inputs))


@some("name", ["llava", "gemma3", "qwen3_vl"], "llava", "qwen3_vl")
def test_blocks_and_banks_give_the_same(name, examples, dense, tmp_path):
    calibration = paths(examples)[:2]
    bank = ("calibrate", dense(name), *calibration, "--samples", 8, "--self-text", 0, "--quiet")
    assert run(*bank, "--out", tmp_path / "sums") == 0
    ways = {
        "whole": paths(examples),
        "blocks": (*paths(examples), "--max-memory", "4GiB"),
        "bank": ("--bank", tmp_path / "sums", *paths(examples)[2:]),
    }
    weights, found = {}, {}
    for way, given in ways.items():
        how = ("--keep", 0.5, "--preset", "fast", "--quiet", *(QUICK[:2] if way != "bank" else ()))
        assert run("prune", dense(name), *given, *how, "--out", tmp_path / way) == 0
        weights[way] = load_model(tmp_path / way)[0].state_dict()
        report = json.loads((tmp_path / way / "liar/report.json").read_text())
        found[way] = report["evaluation"]["pruned"]["perplexity"]
    for way in ("blocks", "bank"):
        assert found[way] == pytest.approx(found["whole"], rel=1e-3)
        for key, value in weights[way].items():
            torch.testing.assert_close(value, weights["whole"][key], rtol=1e-3, atol=1e-4)


def test_the_default_job_reads_images_and_its_own_text(examples, dense, tmp_path, capsys):
    options = ("--keep", 0.7, "--samples", 8, "--seq-len", 16, "--quiet")
    assert run("prune", dense("llava"), *paths(examples), *options, "--out", tmp_path / "a") == 0
    settings = json.loads((tmp_path / "a/liar/report.json").read_text())["settings"]
    assert settings["written_sequences"] > 0
    assert run("prune", dense("llava"), *paths(examples), *options, "--dry-run") == 0
    # Text alone is read as ever.
    (tmp_path / "a.txt").write_text("some words of text. " * 200)
    assert kind_of(str(dense("llava")), [str(tmp_path / "a.txt")]) is None
    text = ("--calibration", tmp_path / "a.txt")
    assert run("prune", dense("llava"), *text, *options, "--out", tmp_path / "text") == 0


def test_captioned_pictures(examples, dense, tmp_path):
    write_pictures(tmp_path / "pictures", 6)
    for number in range(6):
        (tmp_path / f"pictures/{number:02}.txt").write_text(f"number {number}")
    source = str(tmp_path / "pictures")
    assert kind_of(str(dense("llava")), [source]) == IMAGES_WITH_TEXT
    options = ("--calibration", source, *QUICK, "--out", tmp_path / "small")
    assert run("prune", dense("llava"), *options) == 0


def test_what_is_refused(examples, dense, llama_folder, tmp_path, capsys, monkeypatch):
    def refused(*arguments) -> str:
        capsys.readouterr()
        assert run(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "\nhint: " in said
        return said

    calibration, shared = examples / "calibration/examples.jsonl", tmp_path / "a.jsonl"
    job = ("prune", dense("llava"), *QUICK, "--out", tmp_path / "out", "--calibration")
    shutil.copy(examples / "calibration/00.png", tmp_path / "00.png")
    shared.write_text('{"image": "00.png", "text": "a"}\n{"image": "gone.png", "text": "a"}\n')
    assert "a.jsonl line 2: it names the image 'gone.png'" in refused(*job, shared)
    shared.write_text('{"image": "00.png", "text": "a"}\n' * 4)
    said = refused(*job, calibration, "--eval", shared)
    assert "4 of 4 documents are in the calibration text too" in said
    assert "reads images with text, and --calibration self" in refused(*job, calibration, "self")
    (tmp_path / "a.txt").write_text("text")
    assert "a.txt holds no images" in refused(*job, calibration, tmp_path / "a.txt")
    assert "--against is for encoders" in refused(
        *("eval", dense("llava"), "--text", calibration, "--against", dense("llava"))
    )
    shutil.copytree(dense("llava"), tmp_path / "bare")
    (tmp_path / "bare/processor_config.json").unlink()
    bare = ("prune", tmp_path / "bare", *job[2:], calibration)
    assert "bare has no processor to read images with text with" in refused(*bare)
    (tmp_path / "bare/processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    assert "can't load the processor of" in refused(*bare)
    # A model of text alone reads text alone.
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    blind = ("prune", llama_folder, *QUICK, "--out", tmp_path / "out", "--calibration")
    assert 'must have a string in its field "text"' in refused(*blind, chat)
