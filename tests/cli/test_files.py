"""Commands take recordings and pictures where a model reads those."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from calibration.test_media import extractor, write_pictures, write_recordings
from command import run
from tiny import tiny
from transformers import ViTImageProcessorPil, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from liar_ext import encoder_similarity, prune
from liar_ext.calibration.media import AUDIO, IMAGES, decode_image, read_files
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.readers import kind_of, load_reader
from liar_ext.measure.evaluation import word_errors

QUICK = ("--samples", 8, "--keep", 0.5, "--schedule", "one-pass")


def said(capsys, *arguments) -> dict:
    assert run(*arguments, "--json", "--quiet") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tiny DINOv2 with its processor, pruned by the command, and pictures."""
    at = tmp_path_factory.mktemp("pictures")
    tiny("dinov2").save_pretrained(at / "dense")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(at / "dense")
    write_pictures(at / "calibration", 10)
    write_pictures(at / "held_out", 14, seed=1)
    options = ("--calibration", at / "calibration", "--eval", at / "held_out", *QUICK)
    assert run("prune", at / "dense", *options, "--out", at / "small", "--quiet") == 0
    return at


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, tokenizer):
    """A tiny Whisper with its processor, pruned by the command, and recordings."""
    at = tmp_path_factory.mktemp("recordings")
    model = tiny("whisper")
    model.generation_config.max_length = 8
    model.save_pretrained(at / "dense")
    extractor().save_pretrained(at / "dense")
    tokenizer.save_pretrained(at / "dense")
    write_recordings(at / "calibration", 8, said="abc")
    write_recordings(at / "held_out", 3, seed=1, said="b c d")
    options = ("--calibration", at / "calibration", *QUICK)
    assert run("prune", at / "dense", *options, "--out", at / "small", "--quiet") == 0
    return at


def test_a_model_of_waves_from_recordings_to_onnxruntime(recordings, tmp_path, capsys):
    """By blocks it is what it is in memory, and is judged by the dense one's predictions."""
    tiny("wav2vec2").save_pretrained(tmp_path / "dense")
    Wav2Vec2FeatureExtractor(sampling_rate=200).save_pretrained(tmp_path / "dense")
    options = ("--calibration", recordings / "calibration", "--samples", 8, "--keep", 0.6)
    weights = []
    for name, more in (("whole", ()), ("blocks", ("--max-memory", "4GiB"))):
        way = ("--preset", "fast", "--out", tmp_path / name, "--quiet", *more)
        assert run("prune", tmp_path / "dense", *options, *way) == 0
        weights.append(load_model(tmp_path / name)[0].state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)
    found = said(capsys, "eval", tmp_path / "whole", "--text", recordings / "held_out")
    assert 0 < found["divergence"] < 0.1 and "word_error_rate" not in found
    assert run("verify", tmp_path / "whole") == 0
    assert run("export", tmp_path / "whole", "--to", "onnx", "--out", tmp_path / "onnx") == 0
    assert "input_values to logits" in capsys.readouterr().out


def test_a_job_on_pictures_is_that_of_batches_made_by_hand(pictures):
    report = json.loads((pictures / "small/liar/report.json").read_text())
    assert report["settings"]["calibration"] == [str(pictures / "calibration")]
    model, _ = load_model(pictures / "dense")
    reader = load_reader(IMAGES, str(pictures / "dense"), model)
    items = read_files(pictures / "calibration", IMAGES).items
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()[:8]
    made = reader.processor([decode_image(items[at]) for at in order], return_tensors="pt")
    batches = [
        {"pixel_values": each, "fold": torch.full((4,), fold)}
        for fold, each in enumerate(made["pixel_values"].split(4))
    ]
    prune(model, batches, keep=0.5, schedule="one-pass")
    small, _ = load_model(pictures / "small")
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], expected)


def test_pictures_judge_a_pruned_model(pictures, capsys):
    found = json.loads((pictures / "small/liar/report.json").read_text())["evaluation"]
    (dense, _), (small, _) = (load_model(pictures / name) for name in ("dense", "small"))
    reader = load_reader(IMAGES, str(pictures / "small"), small)  # the processor went along
    content = [decode_image(item) for item in read_files(pictures / "held_out", IMAGES).items]
    made = reader.processor(content, return_tensors="pt")["pixel_values"]
    expected = encoder_similarity(small, dense, [{"pixel_values": made}])
    assert expected["cosine"] < 0.999 and expected["sequences"] == 14
    assert found["pruned"] == pytest.approx(expected, rel=1e-4)
    again = said(capsys, "eval", pictures / "small", "--text", pictures / "held_out")
    assert again.pop("against") == str(pictures / "dense")
    assert again == pytest.approx(expected, rel=1e-4)
    few = said(capsys, "eval", pictures / "small", "--text", pictures / "held_out", "--samples", 4)
    assert few["sequences"] == 4


def test_a_bank_and_blocks_on_pictures(pictures, tmp_path, capsys):
    calibration = ("--calibration", pictures / "calibration", "--samples", 8)
    assert run("calibrate", pictures / "dense", *calibration, "-o", tmp_path / "sums") == 0
    options = ("--keep", 0.5, "--preset", "fast", "--quiet")
    bank = ("--bank", tmp_path / "sums", "--eval", pictures / "held_out")
    ways = {"bank": bank, "whole": calibration, "blocks": (*calibration, "--max-memory", "4GiB")}
    weights = {}
    for name, way in ways.items():
        assert run("prune", pictures / "dense", *way, *options, "--out", tmp_path / name) == 0
        weights[name] = load_model(tmp_path / name)[0].state_dict()
    for name in ("bank", "blocks"):
        for key, value in weights[name].items():
            torch.testing.assert_close(value, weights["whole"][key], rtol=1e-3, atol=1e-4)
    shared = ("--bank", tmp_path / "sums", "--eval", pictures / "calibration")
    capsys.readouterr()
    assert run("prune", pictures / "dense", *shared, *options, "--out", tmp_path / "c") == 2
    assert "10 of 10 documents are in the calibration text too" in capsys.readouterr().err


def test_ten_pictures_heal_and_three_are_too_few(pictures, tmp_path, capsys):
    heal = ("heal", pictures / "small", "--steps", 1, "--quiet", "--out", tmp_path / "healed")
    assert run(*heal) == 0
    write_pictures(tmp_path / "few", 3)
    assert run(*heal, "--overwrite", "--calibration", tmp_path / "few") == 2
    error = capsys.readouterr().err
    assert (
        "an eighth can't be held out: 3 file(s) or line(s) of images are too few for two folds"
        in error
    )
    assert "hint: give more of them" in error and "seq-len" not in error


def test_recordings_prune_encoder_and_decoder(recordings, tmp_path, capsys):
    plan = json.loads((recordings / "small/liar/plan.json").read_text())["sites"]
    assert {name.partition(".")[0] for name in plan} == {"encoder", "decoder"}
    assert any("cross" in name for name in plan)
    options = ("--calibration", recordings / "calibration", *QUICK, "--quiet")
    encoder = ("--sites", "encoder", "--out", tmp_path / "encoder")
    assert run("prune", recordings / "dense", *options, *encoder) == 0
    sites = json.loads((tmp_path / "encoder/liar/plan.json").read_text())["sites"]
    assert {name.partition(".")[0] for name in sites} == {"encoder"}
    assert run("prune", recordings / "dense", *options, "--dry-run") == 0
    assert "cross attn" in capsys.readouterr().out


def test_recordings_give_a_word_error_rate(recordings, capsys, monkeypatch):
    text = ("--text", recordings / "held_out")
    found = said(capsys, "eval", recordings / "small", *text)
    assert {"word_error_rate", "dense_word_error_rate", "divergence", "agreement"} <= found.keys()
    assert found["words"] == 12 and found["recordings"] == 3
    assert found["minutes"] == pytest.approx(3 * 0.5 / 60)
    model, _ = load_model(recordings / "dense")
    reader = load_reader(AUDIO, str(recordings / "dense"), model)
    items = read_files(recordings / "held_out", AUDIO).items
    # Heard: "B, c! x d 0" for "b c d 0", then "b d 1" and "b c d 2": one word too many, one lacks.
    heard = iter(["B, c! x d 0", "b d 1", "b c d 2"])
    monkeypatch.setattr(type(reader), "write_down", lambda self, rows: [next(heard) for _ in rows])
    assert word_errors(model, reader, items)["word_error_rate"] == 2 / 12
    how = model.generation_config
    for how.is_multilingual, how.language in ((False, None), (True, "English"), (True, "en")):
        heard = iter(["b c d zero", "b c d one", "b c d two"])
        assert word_errors(model, reader, items)["word_error_rate"] == 0
    how.language, heard = "de", iter(["b c d zero", "b c d one", "b c d two"])
    assert word_errors(model, reader, items)["word_error_rate"] == 3 / 12
    heard = iter(6 * [""])
    assert run("eval", recordings / "small", *text) == 0
    assert "word error rate 100.00% (dense 100.00%) over 12 words" in capsys.readouterr().out


def test_without_transcripts_recordings_are_compared_with_the_dense_model(recordings, capsys):
    for path in (recordings / "unsaid", recordings / "said"):
        shutil.copytree(recordings / "held_out", path, dirs_exist_ok=True)
    for path in (recordings / "unsaid").glob("*.txt"):
        path.unlink()
    found = said(capsys, "eval", recordings / "small", "--text", recordings / "unsaid")
    assert "word_error_rate" not in found and 0 <= found["agreement"] <= 1


def test_what_is_refused(pictures, recordings, tmp_path, capsys, monkeypatch):
    def refused(*arguments) -> str:
        capsys.readouterr()
        assert run(*arguments) == 2
        return capsys.readouterr().err

    dense, small = pictures / "dense", pictures / "small"
    job = ("prune", dense, *QUICK, "--out", tmp_path / "out", "--calibration")
    (tmp_path / "empty").mkdir()
    assert "empty holds no images, which the model reads" in refused(*job, tmp_path / "empty")
    shutil.copytree(pictures / "calibration", tmp_path / "broken")
    for path in (tmp_path / "broken").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert "can't be read as an image" in refused(*job, tmp_path / "broken")
    assert "reads images, and --calibration self, --random-tokens" in refused(*job, "self")
    assert "--pairs is for text" in refused("eval", small, "--pairs", tmp_path / "pairs")
    assert "no part encoder" in refused(*job, pictures / "calibration", "--sites", "encoder")
    shutil.copytree(dense, tmp_path / "bare")
    (tmp_path / "bare/preprocessor_config.json").unlink()
    bare = ("prune", tmp_path / "bare", *job[2:], pictures / "calibration")
    assert "bare has no processor to read images with" in refused(*bare)
    (tmp_path / "bare/preprocessor_config.json").write_text('{"image_processor_type": "None"}')
    assert "can't load the processor of" in refused(*bare)
    shutil.copytree(recordings / "dense", tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    said = ("--calibration", recordings / "calibration", *QUICK, "--out", tmp_path / "out")
    assert "has no tokenizer for what is said" in refused("prune", tmp_path / "mute", *said)
    assert kind_of(str(recordings / "dense")) == AUDIO
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert kind_of("no/such") is None
    assert WhisperFeatureExtractor.from_pretrained(recordings / "small").feature_size == 8
