"""Pairs of texts are read as they stand, and what is none is told by its line."""

from __future__ import annotations

import json

import pytest
import torch

from liar_ext import InputError
from liar_ext.measure.embeddings import Pairs, pair_quality, read_pairs


def test_a_line_is_a_pair_of_texts_with_a_score_or_without(tmp_path):
    (tmp_path / "a.tsv").write_text("a b\tc\t0.5\r\nd\te\t4\r\n\n", newline="")
    assert read_pairs(str(tmp_path / "a.tsv")) == Pairs(["a b", "d"], ["c", "e"], [0.5, 4.0])
    (tmp_path / "b.txt").write_text("1\t2\n3\t4")
    assert read_pairs(str(tmp_path / "b.txt")) == Pairs(["1", "3"], ["2", "4"], None)
    rows = [["a\tb", "c", 1], {"score": 2.5, "sentence1": "d", "sentence2": "e\u2028f"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = Pairs(["a\tb", "d"], ["c", "e\u2028f"], [1.0, 2.5])
    assert read_pairs(str(tmp_path / "c.jsonl")) == found


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.tsv", "a\tb\nc", "a.tsv line 2 must have two texts"),
        ("a.tsv", "a\tb\tc\nd\te\t1", "a.tsv line 1 must have two texts"),
        ("a.tsv", "a\tb\tnan\nd\te\t1", "line 1 must have two texts"),
        ("a.tsv", "a\tb\t1\t2\nd\te\t1\t2", "line 1 must have two texts"),
        ("a.tsv", "main\tMSRvid\t2012\t1\t5.0\ta\tb", "line 1 must .*STS-B take awk"),
        ("a.tsv", "a\t \nd\te", "line 1 must have two texts"),
        ("a.tsv", "a\tb\t1\nd\te", "with a score and without"),
        ("a.tsv", "a\tb\t1", "all lines of .* end with 1.0; give more pairs"),
        ("a.tsv", "a\tb\t1\nd\te\t1", "all lines of .* end with 1.0"),
        ("a.tsv", "a\tb\nd\tb", "all lines of .* end with b"),
        ("a.tsv", "\n\n", "a.tsv has no lines"),
        ("a.jsonl", '["a", "b"]\n{', "a.jsonl line 2 must have two texts"),
        ("a.jsonl", '["a", "b", true]\n["c", "d", 1]', "line 1 must have two texts"),
        ("a.jsonl", '["a", "b", 1, 2]\n3', "line 1 must have two texts"),
        ("a.jsonl", '["a", "\\ud800"]\n["b", "c"]', "line 1 must be Unicode"),
    ],
)
def test_what_is_no_pair_is_told(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_pairs(str(tmp_path / name))


def test_embeddings_that_say_nothing_have_no_correlation():
    """Ranks of NaNs would be those of their places."""
    texts, scores, x = ["a", "b", "c"], [1.0, 2.0, 3.0], torch.eye(3)
    assert pair_quality(x, x, texts, scores) == {"spearman": 0.0, "pairs": 3}
    for known in (scores, None):
        with pytest.raises(InputError, match="embeddings must be finite"):
            pair_quality(x, x * torch.nan, texts, known)


def test_a_file_that_is_missing_is_told(tmp_path):
    with pytest.raises(InputError, match="is no file; give one with two texts in each line"):
        read_pairs(str(tmp_path))
