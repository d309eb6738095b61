from __future__ import annotations

import gzip
import json

import pytest

from liar_ext import InputError
from liar_ext.calibration import documents as texts


def test_sources_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one document\n\nof two paragraphs")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n{"text": " "}\n')
    assert texts.read_documents(str(tmp_path / "a.txt")) == ["one document\n\nof two paragraphs"]
    assert texts.read_documents(str(tmp_path / "b.jsonl")) == ["x", "y"]
    assert len(texts.read_documents(str(tmp_path))) == 3


def test_a_dataset_by_name(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split))
        column = "text" if config != "bare" else "body"
        return datasets.Dataset.from_dict({column: ["p", "q"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts.read_documents("org/name") == ["p", "q"]
    assert texts.read_documents("name:raw:test") == ["p", "q"]
    assert asked == [("org/name", None, "train"), ("name", "raw", "test")]
    with pytest.raises(InputError, match="dataset name:bare row 0 must have a string .*body"):
        texts.read_documents("name:bare")


def test_a_dataset_that_the_caller_has_prepared():
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["p", " ", "q"], "n": [1, 2, 3]})
    for given in (rows, rows.to_iterable_dataset(num_shards=2)):
        assert texts.read_documents(given) == ["p", "q"]
        assert texts.read_documents(given.filter(lambda row: row["n"] > 1)) == ["q"]
        with pytest.raises(InputError, match="dataset given row 0 must have a string"):
            texts.read_documents(given.remove_columns("text"))
        with pytest.raises(InputError, match="the dataset given holds no text"):
            texts.read_documents(given.filter(lambda row: row["n"] == 2))
    with pytest.raises(
        InputError,
        match="row 0 must .*, got some text; .* such rows",
    ):
        texts.read_documents(["some text"])  # documents themselves


def test_what_is_neither_a_file_nor_a_dataset(monkeypatch):
    import datasets

    def load(name, config, split, streaming):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match="a dataset: no_such_dataset .*; give a text file"):
        texts.read_documents("no_such_dataset")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """A download would ask twelve times, with waits."""
    import huggingface_hub

    asked = []

    def refuse(url):
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(InputError, match="no file texts here; the hub can't be reached"):
        texts.read_documents("texts")
    assert len(asked) == 1 and asked[0].endswith("/datasets/texts/resolve/main/README.md")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        (
            "latin.txt",
            "caf\xe9".encode("latin-1"),
            "UTF-8: .* byte 0xe9 in position 3: ",
        ),
        ("text.txt.gz", gzip.compress(b"text", mtime=0), "must be UTF-8: .*; if it is text"),
        ("wide.txt", "text".encode("utf-16"), "must be UTF-8: .*; if it is text"),
        (
            "unmarked.txt",
            "text".encode("utf-16-le"),
            "holds NUL bytes, it is binary",
        ),
        ("zeros.txt", bytes(5000), "holds NUL bytes, it is binary"),
        ("rows.jsonl", b'{"body": "x"}', 'line 1 must have a string in its field "text"'),
        ("rows.jsonl", b'{"text": "x"}\nnot json', "line 2 must have a string .*got"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts.read_documents(str(tmp_path / name))


def test_missing_file():
    with pytest.raises(InputError, match="does not exist"):
        texts.read_documents("/nowhere/text.txt")
    with pytest.raises(InputError, match="~/text does not exist; give"):
        texts.read_documents("~/text")


def test_json_lines_survive_unicode(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps({"text": "ünïcode 文"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts.read_documents(str(path)) == ["ünïcode 文"]


def test_a_suffix_in_capitals_and_tables(tmp_path):
    row = '{"text": "a"}\n'
    (tmp_path / "a.JSONL").write_text(row)
    assert texts.read_documents(tmp_path / "a.JSONL") == ["a"]
    (tmp_path / "a.json").write_text(row)
    read = texts.read_documents(tmp_path / "a.json")
    assert read == [row] and "a.json was read as plain text" in read.notes[0]
    assert "a.json was read as plain text" in texts.read_documents(tmp_path).notes[0]
    for name in ("b.csv", "c.TSV"):
        (tmp_path / name).write_text(row)
    (note,) = texts.read_documents(tmp_path).notes  # one for all
    assert "a.json and 2 more were read as plain text" in note
    (tmp_path / "pipe").write_text(row)  # such as /dev/stdin
    assert "pipe was read as plain text" in texts.read_documents(tmp_path / "pipe").notes[0]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_json_lines_end_at_line_feeds_only(tmp_path, separator):
    rows = [f"a{separator}b", "c"]
    lines = [json.dumps({"text": text}, ensure_ascii=ord(separator) < 32) for text in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode("utf-8"))
    assert texts.read_documents(str(path)) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": null}', 'a string in its field "text", .*None}; write'),
        ('{"text": 3}', "a string"),
        ('["text"]', "a string"),
        ('{"body": "x", "id": 3}', 'a string in its field "text", .*body.*id'),
        ('{"text": "x"', "line 2 must have a string .*got"),
        ("{}", "must have a string"),
        ("[" * 100_000, "must have a string"),
        ('{"text": ' + "9" * 5000 + "}", "must have a string"),
        (r'{"text": "x\ud800"}', "line 2 must be Unicode: .*ud800.* not allowed"),
        ('{"text": "x", "text_pair": 3}', "line 2 must have .* in .text_pair. if it has one"),
        (
            r'{"text": "x", "text_pair": "\udfff"}',
            "line 2 must be Unicode: .*not allowed",
        ),
    ],
)
def test_unusable_json_lines(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n' + line)
    with pytest.raises(InputError, match=message):
        texts.read_documents(str(path))


def test_pairs_of_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "text_pair": "b"}\n{"text": "c", "text_pair": null}\n')
    pair, single = texts.read_documents(str(path))
    assert pair.texts == ("a", "b") and not isinstance(single, texts.Pair)
    assert texts.document_digests([pair]) != texts.document_digests(["a"])
    rows = [{"text": "a", "text_pair": "b"}, {"text": "c", "text_pair": None}]
    assert texts.read_documents(rows) == [pair, single]
    with pytest.raises(InputError, match="row 0 must have a string .* in .text_pair."):
        texts.read_documents([{"text": "a", "text_pair": 0}])


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_not_the_working_directory(source):
    with pytest.raises(InputError, match="the source is empty"):
        texts.read_documents(source)


def test_a_dataset_is_read_no_further_than_needed(monkeypatch):
    import datasets

    taken = []

    def load(name, config, split, streaming):
        assert streaming

        def rows():
            for index in range(1000):
                taken.append(index)
                yield {"text": None if index == 1 else "x" * 10}

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(texts, "MOST_OF_A_DATASET", 25)
    documents = texts.read_documents("name")
    assert documents == ["x" * 10] * 3 and max(taken) < 10
    assert documents.notes == [
        "Of the dataset name the first 3 documents were read, 30 characters.",
        "Rows of the dataset name without text: 1.",
    ]


def test_a_cached_dataset_serves_where_streaming_cannot(monkeypatch):
    import datasets

    def load(name, config, split, streaming):
        if streaming:
            raise ConnectionError("offline")
        return datasets.Dataset.from_dict({"text": ["p"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts.read_documents("name") == ["p"]


def test_documents_that_are_calibrated_on_do_not_judge(tmp_path):
    story = "Once upon a time, " * 20
    other = "Another tale altogether. " * 20
    copy = story.upper().replace(" ", "\n ")

    def check_apart(calibration, evaluation):
        texts.check_apart(texts.document_digests(calibration), evaluation)

    check_apart([story, "Title"], [other, "Title", "End"])
    with pytest.raises(InputError, match="1 of 3 documents are in the calibration text"):
        check_apart([story, "Title"], [other, copy, "End"])
    with pytest.raises(InputError, match="2 of 3 documents"):
        check_apart(["a b", "c"], ["AB", "C", "d"])
