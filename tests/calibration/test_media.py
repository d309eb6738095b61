"""Recordings and pictures: files, folders and datasets, and inputs by a processor."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny import tiny
from transformers import ViTImageProcessorPil, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from liar_ext import InputError
from liar_ext.calibration.documents import check_apart, document_digests, text_digest
from liar_ext.calibration.media import (
    AUDIO,
    IMAGES,
    Files,
    Item,
    Reader,
    calibration_inputs,
    decode_audio,
    decode_image,
    evaluation_inputs,
    language_of,
    read_files,
)
from liar_ext.measure.evaluation import _alike

RATE = 16_000


def write_pictures(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{number:02}.png")
    return pixels


def write_recordings(folder, count, seed=0, seconds=0.5, said=""):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        samples = 0.1 * generator.standard_normal(int(RATE * seconds)).astype(np.float32)
        soundfile.write(folder / f"{number:02}.wav", samples, RATE)
        if said:
            (folder / f"{number:02}.txt").write_text(f" {said}\n{number}\n")


def extractor() -> WhisperFeatureExtractor:
    """Return one whose windows of a second are 12 frames, as tiny Whisper reads them."""
    return WhisperFeatureExtractor(feature_size=8, hop_length=1333, chunk_length=1)


def images(model=None) -> Reader:
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    return Reader(IMAGES, model or tiny("vit"), processor)


def test_a_folder_is_its_files_with_what_is_said_beside(tmp_path):
    write_recordings(tmp_path / "a", 2, said="a word")
    write_recordings(tmp_path / "b", 1, seed=1)
    (tmp_path / "b/notes.md").write_text("no recording")
    files = read_files(str(tmp_path), AUDIO)
    assert [item.text for item in files.items] == ["a word 0", "a word 1", ""]
    assert [item.place for item in files.items] == sorted(map(str, tmp_path.rglob("*.wav")))
    lone = read_files(tmp_path / "b/00.wav", AUDIO)
    assert list(lone) == list(files)[2:] and not files.notes


def test_files_are_told_apart_by_their_bytes_not_their_names(tmp_path):
    write_pictures(tmp_path / "a", 3)
    write_pictures(tmp_path / "same", 2)
    write_pictures(tmp_path / "other", 3, seed=1)
    some, same, other = (read_files(tmp_path / n, IMAGES) for n in ("a", "same", "other"))
    check_apart(document_digests(some), other)
    with pytest.raises(InputError, match="2 of 2 documents are in the calibration text too"):
        check_apart(document_digests(some), same)
    assert text_digest(some) != text_digest(same)


def test_of_very_many_files_evenly_spread_ones_are_read(tmp_path, monkeypatch):
    write_pictures(tmp_path, 9)
    monkeypatch.setattr("liar_ext.calibration.media.MOST_FILES", 3)
    files = read_files(tmp_path, IMAGES)
    assert [item.place[-6:] for item in files.items] == ["00.png", "03.png", "06.png"]
    assert files.notes == [f"Of 9 files of {tmp_path} 3 were read."]


def test_a_dataset_has_a_column_of_them(tmp_path, monkeypatch):
    import datasets

    pixels = write_pictures(tmp_path, 3)
    rows = [{"bytes": (tmp_path / f"{n:02}.png").read_bytes(), "path": None} for n in range(3)]
    made = datasets.Dataset.from_dict({"image": rows, "caption": ["x", "y", "z"]})
    made = made.cast_column("image", datasets.Image())
    for rows in (made, made.to_iterable_dataset()):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)  # noqa: B023
        files = read_files("org/name:config:train", IMAGES)
        assert [item.text for item in files.items] == ["x", "y", "z"]
        for item, each in zip(files.items, pixels, strict=True):
            assert np.array_equal(np.asarray(decode_image(item)), each)
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(100), RATE, format="WAV")
    column = [{"bytes": sound.getvalue(), "path": None}, None]
    heard = datasets.Dataset.from_dict({"audio": column, "sentence": ["a b", "c"]})
    heard = heard.cast_column("audio", datasets.Audio())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: heard)
    (item,) = read_files("org/name", AUDIO).items
    assert item.text == "a b" and len(decode_audio(item, RATE)) == 100
    with pytest.raises(InputError, match="must have images in a column image, got columns audio"):
        read_files("org/name", IMAGES)


def test_recordings_are_resampled_and_mixed(tmp_path):
    time = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * 200 * time).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, 0 * tone], 1)[::2], RATE // 2)
    (item,) = read_files(tmp_path, AUDIO).items
    found = decode_audio(item, RATE)
    assert found.dtype == np.float32 and len(found) == RATE
    assert np.abs(found - tone / 2)[100:-100].max() < 1e-3


def test_what_is_wrong_with_files(tmp_path):
    with pytest.raises(InputError, match="gone does not exist; give a folder of images"):
        read_files(tmp_path / "gone", IMAGES)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("text")
    with pytest.raises(InputError, match=r"holds no images, .* end in .png"):
        read_files(tmp_path / "empty", IMAGES)
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes/a.wav")  # whose reader would wait for a writer
    with pytest.raises(InputError, match="a.wav: it is no ordinary file"):
        read_files(tmp_path / "pipes", AUDIO)
    with pytest.raises(InputError, match="no ordinary file"):
        Item("row 0", Path("/dev/zero")).read()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing else")
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "silent.flac", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2]), RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="broken.png can't be read as an image"):
        decode_image(read_files(tmp_path / "broken.png", IMAGES).items[0])
    for name in ("broken.wav", "silent.flac", "nan.wav"):
        with pytest.raises(InputError, match=f"{name} can't be read as a recording"):
            decode_audio(read_files(tmp_path / name, AUDIO).items[0], RATE)


def test_pictures_are_drawn_in_two_folds_and_apart(tmp_path):
    write_pictures(tmp_path / "a", 20)
    write_pictures(tmp_path / "b", 20, seed=1)
    reader, sources = images(), [read_files(tmp_path / name, IMAGES) for name in "ab"]
    settings = {"samples": 12, "certify": 4, "judge": 4}
    drawn = calibration_inputs(sources, reader, seed=3, **settings)
    assert drawn.inputs["pixel_values"].shape == (12, 3, 8, 8)
    assert drawn.fold.tolist() == 6 * [0] + 6 * [1] and drawn.source.bincount().tolist() == [6, 6]
    parts = [drawn, drawn.certification, drawn.judging]
    rows = torch.cat([part.inputs["pixel_values"] for part in parts]).flatten(1)
    assert len(rows.unique(dim=0)) == 20  # no picture is in two parts
    again = calibration_inputs(sources, reader, seed=3, **settings)
    assert torch.equal(again.inputs["pixel_values"], drawn.inputs["pixel_values"])
    other = calibration_inputs(sources, reader, seed=4, **settings)
    assert not torch.equal(other.inputs["pixel_values"], drawn.inputs["pixel_values"])
    batches = drawn.batches(4)
    assert [batch["fold"].unique().numel() for batch in batches] == 4 * [1]
    # As the processor itself makes them.
    judged = evaluation_inputs(sources[0], reader, samples=5)
    expected = [decode_image(item) for item in sources[0].items[::4]]
    expected = reader.processor(expected, return_tensors="pt")["pixel_values"]
    assert torch.equal(judged.inputs["pixel_values"], expected)


def test_too_few_pictures(tmp_path):
    write_pictures(tmp_path, 3)
    files = [read_files(tmp_path, IMAGES)]
    drawn = calibration_inputs(files, images(), samples=8)
    assert len(drawn) == 2 and drawn.notes == ("The calibration set gave 2 of 8 files.",)
    with pytest.raises(InputError, match="too few for two folds and what is kept apart"):
        calibration_inputs(files, images(), samples=8, certify=4)


@pytest.mark.parametrize(("sources", "each"), [(1, 5), (2, 4)])
def test_of_few_pictures_two_are_kept_apart_first(tmp_path, sources, each):
    write_pictures(tmp_path, 12 // sources)
    files = sources * [read_files(tmp_path, IMAGES)]
    drawn = calibration_inputs(files, images(), samples=16, judge=2, must_judge=True)
    assert drawn.fold.tolist() == each * [0] + each * [1] and len(drawn.judging) == 2
    drawn = calibration_inputs(files, images(), samples=128, certify=4)
    assert drawn.fold.tolist() == each * [0] + each * [1] and len(drawn.certification) == 2
    if sources == 1:  # without need nothing is taken from the folds
        with pytest.raises(InputError, match="too few for two folds and what is kept apart"):
            calibration_inputs(files, images(), samples=16, judge=2)
    few = [Files(files[0].items[:4])]
    drawn = calibration_inputs(few, images(), judge=2, must_judge=True)
    assert drawn.fold.tolist() == [0, 1] and len(drawn.judging) == 2


@pytest.mark.parametrize("each", [1, 2])
def test_few_pictures_in_several_folders_are_as_many_in_one(tmp_path, each):
    write_pictures(tmp_path, 6)
    items = read_files(tmp_path, IMAGES).items
    sources = [Files(items[at : at + each]) for at in range(0, 6, each)]
    whole, parts = (
        calibration_inputs(some, images(), samples=16, judge=2, must_judge=True)
        for some in ([Files(items)], sources)
    )
    assert parts.fold.tolist() == whole.fold.tolist() == [0, 0, 1, 1]
    assert len(parts.judging) == len(whole.judging) == 2
    assert len(set(parts.source.tolist())) > 1


def test_a_decoder_reads_what_is_said_or_what_the_model_hears(tmp_path, tokenizer):
    write_recordings(tmp_path / "said", 2, said="abc")
    write_recordings(tmp_path / "unsaid", 1, seed=1)
    write_recordings(tmp_path / "long", 1, seed=2, seconds=2.2, said="abc")
    model = tiny("whisper")
    reader = Reader(AUDIO, model, extractor(), tokenizer)
    heard = []
    reader.write_down = lambda features: heard.append(features) or len(features) * ["de"]
    found = evaluation_inputs(read_files(tmp_path, AUDIO), reader)
    # The long recording is three pieces, of which nobody knows what is said where.
    assert found.inputs["input_features"].shape == (6, 8, 12)
    assert sum(map(len, heard)) == 4
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in _decoder(found)]
    tokens = [tokenizer(text)["input_ids"][:-1] for text in 3 * ["de"] + ["abc 0", "abc 1", "de"]]
    assert texts == [tokenizer.decode(row) for row in tokens]
    with torch.no_grad():
        assert model(**found.inputs).logits.isfinite().all()


@pytest.mark.parametrize("language", [None, "de", "german", "<|de|>"])
def test_a_decoder_is_told_the_language_that_it_writes_first(
    tmp_path, tokenizer, language, monkeypatch
):
    write_recordings(tmp_path, 3, said="abc")
    model = tiny("whisper")
    how = model.generation_config
    how.lang_to_id, how.task_to_id = {"<|en|>": 40, "<|de|>": 41}, {"transcribe": 42}
    how.language, how.decoder_start_token_id = language, 1
    reader = Reader(AUDIO, model, extractor(), tokenizer)
    files = read_files(tmp_path, AUDIO)
    plain = Reader(AUDIO, tiny("whisper"), extractor(), tokenizer)
    before = evaluation_inputs(files, plain).inputs["decoder_input_ids"]
    inputs = evaluation_inputs(files, reader).inputs
    found = inputs["decoder_input_ids"]
    german = torch.tensor(41)
    heard = german if language else model.detect_language(inputs["input_features"])
    assert (found[:, 1] == heard).all() and (found[:, 2] == 42).all()
    assert torch.equal(torch.cat([found[:, :1], found[:, 3:]], 1), before)
    assert torch.equal(inputs["decoder_attention_mask"].sum(1), (before != 0).sum(1) + 2)
    # A tokenizer that writes them itself is left to do so.
    monkeypatch.setattr(tokenizer, "language", "de", raising=False)
    again = evaluation_inputs(files, reader).inputs["decoder_input_ids"]
    assert torch.equal(again, before)


@pytest.mark.parametrize(
    "named, code",
    [(None, ""), ("en", "en"), ("<|EN|>", "en"), ("English", "en"), ("burmese", "my")],
)
def test_calibration_and_word_errors_read_one_language(named, code):
    model = tiny("whisper")
    model.generation_config.language = named
    assert language_of(model) == code
    assert type(_alike(model)).__name__.startswith("English" if code == "en" else "Basic")


def _decoder(found):
    return zip(
        found.inputs["decoder_input_ids"], found.inputs["decoder_attention_mask"], strict=True
    )


def test_short_recordings_are_put_together_to_calibrate_on(tmp_path, tokenizer):
    write_recordings(tmp_path / "a", 6, said="abc", seconds=0.4)
    write_recordings(tmp_path / "b", 2, seed=1, seconds=0.4)
    reader = Reader(AUDIO, tiny("whisper"), extractor(), tokenizer)
    reader.write_down = lambda features: len(features) * ["de"]
    given = [read_files(tmp_path / name, AUDIO) for name in "ab"]
    samples = {bytes(decode_audio(item, RATE)): item.text for f in given for item in f.items}
    clips = reader.joined(
        [(np.frombuffer(each, np.float32), said) for each, said in samples.items()]
    )
    # Two of 0.4 seconds fit into one second; nobody knows all that is said in the last.
    assert [len(each) for each, _ in clips] == 4 * [int(0.8 * RATE)]
    assert [said for _, said in clips] == ["abc 0 abc 1", "abc 2 abc 3", "abc 4 abc 5", ""]
    drawn = calibration_inputs(given, reader, samples=8)
    # Four files of one source and two of the other, half of them in each fold.
    assert drawn.source.tolist() == [0, 1, 0, 1] and drawn.fold.tolist() == [0, 0, 1, 1]
    assert len(evaluation_inputs(given[0], reader)) == 6


def test_a_model_of_waves_reads_equal_pieces_of_all_that_is_heard(tmp_path):
    write_recordings(tmp_path / "long", 3, seconds=2.4)
    write_recordings(tmp_path / "short", 1, seed=1)
    reader = Reader(AUDIO, tiny("wav2vec2"), Wav2Vec2FeatureExtractor(do_normalize=False))
    long, short = (read_files(tmp_path / name, AUDIO) for name in ("long", "short"))
    heard = np.concatenate([decode_audio(item, RATE) for item in long.items])
    found = evaluation_inputs(long, reader).inputs["input_values"].numpy()
    assert len(heard) == int(7.2 * RATE) and np.array_equal(found, [heard[: 5 * RATE]])
    (once,) = (decode_audio(item, RATE) for item in short.items)  # half a second, again and again
    found = evaluation_inputs(short, reader).inputs["input_values"].numpy()
    assert np.array_equal(found, [np.tile(once, 10)])
    drawn = calibration_inputs([long, short], reader, samples=8)
    assert drawn.fold.tolist() == [0, 1] and drawn.source.tolist() == [0, 0]
    with torch.no_grad():
        assert reader.model(drawn.inputs["input_values"]).logits.isfinite().all()


def test_a_reader_refuses_what_files_do_not_hold(tokenizer):
    with pytest.raises(InputError, match="CLIPModel reads input_ids beside images"):
        images(tiny("clip"))
    with pytest.raises(InputError, match="has no tokenizer for what is said"):
        Reader(AUDIO, tiny("whisper"), extractor())


def test_a_picture_is_turned_as_the_camera_says(tmp_path):
    """As transformers and processors of chats read it."""
    from transformers.image_utils import load_image

    (pixels,) = write_pictures(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(pixels).save(tmp_path / "00.png", exif=exif)
    (item,) = read_files(tmp_path, IMAGES).items
    found = decode_image(item)
    assert found.size == (10, 12)
    assert np.array_equal(np.asarray(found), np.asarray(load_image(str(tmp_path / "00.png"))))


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "no.png").write_bytes(b"")
    (item,) = read_files(tmp_path, IMAGES).items
    with pytest.raises(InputError, match=r"no.png can't be read as an image: cannot identify"):
        decode_image(item)
