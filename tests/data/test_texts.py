from __future__ import annotations

import json

import pytest
import torch

from liar_ext import InputError
from liar_ext.data import texts


def test_sources_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one document\n\nof two paragraphs")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n{"text": " "}\n')
    assert texts.read_documents(str(tmp_path / "a.txt")) == ["one document\n\nof two paragraphs"]
    assert texts.read_documents(str(tmp_path / "b.jsonl")) == ["x", "y"]
    assert len(texts.read_documents(str(tmp_path))) == 3


def test_a_dataset_by_name(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        column = "text" if config != "bare" else "body"
        return datasets.Dataset.from_dict({column: ["p", "q"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts.read_documents("org/name") == ["p", "q"]
    assert texts.read_documents("name:raw:test") == ["p", "q"]
    assert asked == [("org/name", None, "train"), ("name", "raw", "test")]
    with pytest.raises(InputError, match="must have a column text, got body"):
        texts.read_documents("name:bare")


def test_what_is_neither_a_file_nor_a_dataset(monkeypatch):
    import datasets

    def load(name, config, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match="neither a file nor a dataset: no_such_dataset"):
        texts.read_documents("no_such_dataset")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "must be UTF-8, got byte 0xe9 at position 3"),
        ("rows.jsonl", b'{"body": "x"}', 'line 1 must be a JSON object with a field "text"'),
        ("rows.jsonl", b'{"text": "x"}\nnot json', "line 2 must be"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts.read_documents(str(tmp_path / name))


def test_missing_file():
    with pytest.raises(InputError, match="does not exist"):
        texts.read_documents("/nowhere/text.txt")


def test_no_document_stands_in_both_folds(tokenizer):
    documents = [letter * 30 for letter in "abcdefghij"]
    drawn = texts.calibration_sequences([documents], tokenizer, samples=20, seq_len=8)
    letters = [set(row.tolist()) for row in drawn.input_ids]
    for letter in tokenizer("abcdefghij")["input_ids"]:
        folds = {int(f) for row, f in zip(letters, drawn.fold, strict=True) if letter in row}
        assert len(folds) <= 1, "a document that stands in both folds voids the certificate"


def test_a_lone_document_is_halved(tokenizer):
    text = "a" * 50 + " " + "b" * 50
    drawn = texts.calibration_sequences([[text]], tokenizer, samples=8, seq_len=10)
    a, b = tokenizer("ab")["input_ids"]
    assert (drawn.input_ids[drawn.fold == 0] == a).all()
    assert not (drawn.input_ids[drawn.fold == 1] == a).any()


def test_sources_contribute_evenly(tokenizer):
    long, short = ["a" * 400] * 10, ["b" * 40] * 4
    drawn = texts.calibration_sequences([long, short], tokenizer, samples=8, seq_len=10)
    b = tokenizer("b")["input_ids"][0]
    assert int((drawn.input_ids == b).any(1).sum()) == 4
    assert drawn.fold.tolist() == [0] * 4 + [1] * 4


def test_the_seed_decides(tokenizer):
    documents = [letter * 37 for letter in "abcdefghijklmnop"]
    draws = [
        texts.calibration_sequences([documents], tokenizer, samples=6, seq_len=9, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].input_ids, draws[1].input_ids)
    assert not torch.equal(draws[0].input_ids, draws[2].input_ids)


def test_encoders_get_padded_documents(tokenizer):
    drawn = texts.calibration_sequences(
        [["abc", "de", "f", "ghij"]], tokenizer, samples=4, seq_len=3, packed=False
    )
    assert drawn.input_ids.shape == (4, 3)
    assert drawn.tokens == 3 + 2 + 1 + 3
    for batch in drawn.batches(3):
        assert len(set(batch["fold"].tolist())) == 1


@pytest.mark.parametrize("documents", [["abc"], ["abc", "def"]])
def test_too_short_to_calibrate(tokenizer, documents):
    with pytest.raises(InputError, match="too short: .* give more text or a smaller seq_len"):
        texts.calibration_sequences([documents], tokenizer, samples=4, seq_len=64)
    with pytest.raises(InputError, match="does not fill one window of 64 tokens"):
        texts.evaluation_sequences(documents, tokenizer, seq_len=64)


def test_evaluation_windows_spread_over_the_text(tokenizer):
    text = "".join(letter * 10 for letter in "abcdefgh")
    windows = texts.evaluation_sequences([text], tokenizer, seq_len=10, samples=4)
    assert tokenizer.decode(windows.input_ids[:, 0]).replace(" ", "") == "aceg"


def test_json_lines_survive_unicode(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps({"text": "ünïcode 文"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts.read_documents(str(path)) == ["ünïcode 文"]
