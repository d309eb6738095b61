"""The demo's pieces on tiny models and texts; the real models are for `make demo`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def demo_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))


class Letters:
    """A tokenizer of one token per letter, 3 to 28; 0 pads, and 2 ends a text."""

    eos_token_id = 2

    def __call__(self, texts, return_tensors=None, max_length=64, **_):
        one = isinstance(texts, str)
        ids = [self.encode(text)[:max_length] for text in ([texts] if one else texts)]
        if return_tensors is None:
            return {"input_ids": ids[0] if one else ids}
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}

    pad_token_id = 0

    def encode(self, text):
        return [3 + ord(letter) - ord("a") for letter in text.lower() if letter.isalpha()]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + (i - 3) % 26) for i in ids if i > 2)


ARTICLES = [
    f"{word} title\n\nThe {word} body has enough {word} words to be read. It ends here, " * 3
    for word in ("apple", "banana", "cherry", "date", "elder", "fig", "grape", "hazel")
]


def test_recall_by_hand():
    import encoder

    bodies = torch.eye(3)
    titles = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.0, 0.1, 0.9]])
    assert encoder.nearest_is_own(titles, bodies).tolist() == [True, False, True]


def test_an_embedding_does_not_depend_on_the_texts_beside_it():
    import encoder

    model, tokenizer = tiny("distilbert").eval(), Letters()
    texts = ["a long text with many letters", "short", "of middle length"]
    together = encoder.embed(model, tokenizer, texts)
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(encoder.embed(model, tokenizer, [text])[0], row)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_the_encoder_is_compared_with_itself(monkeypatch):
    import encoder

    monkeypatch.setattr(encoder, "ROUNDS", 2)
    model = tiny("distilbert").eval()
    both = model, Letters()
    found = encoder.compare({"dense": both, "same": both}, ARTICLES)
    assert found["same"]["articles"] == len(ARTICLES)
    assert found["same"]["found_by_dense_only"] == found["same"]["found_by_this_only"] == 0
    assert found["same"]["recall_at_1"] == found["dense"]["recall_at_1"]
    assert all(of["sentences_per_second"] > 0 for of in found.values())


def test_prompts_are_evenly_spread_over_articles_that_are_long_enough(monkeypatch):
    import decoder

    monkeypatch.setattr(decoder, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(decoder, "NEW_TOKENS", 2)
    texts = ["abc", *(letter * 6 for letter in "defghi"), "xyz"]  # two are too short
    ids = decoder.openings(texts, Letters())
    assert [Letters().decode(row) for row in ids] == ["eeee", "gggg", "iiii"]


def test_greedy_takes_the_likeliest_token_each_time():
    import decoder

    model, ids = tiny("llama").eval(), list(range(3, 12))
    expected = list(ids)
    while len(expected) < 15 and expected[-1] != model.config.eos_token_id:
        logits = model(torch.tensor([expected])).logits[0, -1]
        expected.append(int(logits.argmax()))
    assert decoder.greedy(model, ids, 6) == expected[len(ids) :]


def test_equal_tokens_and_repeats_by_hand():
    import decoder

    assert decoder.equal_at_start([1, 2, 3], [1, 2, 4]) == 2
    assert decoder.equal_at_start([1, 2, 3], [1, 2, 3]) == 3
    assert decoder.equal_at_start([1, 2, 3], [1, 2]) == 2
    assert decoder.repeated([[1, 2, 3, 4, 5]]) == 0
    # 121, 212, 121, 212: two of four are there already.
    assert decoder.repeated([[1, 2, 1, 2, 1, 2]]) == 0.5
    assert decoder.repeated([[1, 2]]) == 0


def test_a_continuation_stops_at_the_end_of_its_text():
    import decoder

    assert decoder.one_line(Letters(), [3, 4, 2, 5]) == "ab"


def test_both_jobs_are_reported(monkeypatch):
    import decoder
    import encoder
    import tables

    monkeypatch.setattr(encoder, "ROUNDS", 1)
    for name, value in {"WINDOWS": 2, "WINDOW": 16, "PROMPT_TOKENS": 6, "NEW_TOKENS": 5}.items():
        monkeypatch.setattr(decoder, name, value)
    monkeypatch.setattr(decoder, "PREFILL_ROUNDS", 1)
    small, causal = tiny("distilbert").eval(), tiny("llama").eval()
    other = copy.deepcopy(causal)
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    results = {
        "encoder": {
            "lines": ["liar prune A", ">>> import liar_ext"],
            "models": encoder.compare(
                {"dense": (small, Letters()), "half": (small, Letters())}, ARTICLES
            ),
        },
        "decoder": {
            "lines": ["liar prune B"],
            **decoder.compare({"dense": causal, "90 %": other}, Letters(), ARTICLES),
        },
        "seconds": {"one": 100.0, "two": 200.0},
        "threads": 2,
    }
    json.dumps(results)
    dense = results["decoder"]["models"]["dense"]
    assert dense["equal_tokens"] == [5, 5, 5] and dense["tokens"] == 30
    text = tables.report(results)
    assert f"| {results['encoder']['models']['dense']['recall_at_1']:.3f} |" in text
    assert "    liar prune A\n    >>> import liar_ext\n" in text
    assert "All took 5 min." in text
    assert text.count("- 90 %: ") == 3


def test_a_table_lines_up():
    import tables

    lines = tables.table(["model", "dense", "50 %"], [("speed", ["1", "2.00 (2×)"])])
    assert lines[0] == "| model | dense |      50 % |"
    assert lines[1] == "|-------|------:|----------:|"
    assert lines[2] == "| speed |     1 | 2.00 (2×) |"


def test_stages_say_how_much_is_left(monkeypatch, capsys):
    import jobs

    now = [0.0]
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: now[0])
    stages = jobs.Stages({"first": 60, "second": 120})
    stages.next()
    now[0] = 120.0  # twice as long as expected
    stages.next()
    now[0] = 300.0
    stages.end()
    assert stages.seconds == {"first": 120.0, "second": 180.0}
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0] == "── 1 of 2 · first · about 3 min left ──"
    assert lines[1] == "── 2 of 2 · second · about 4 min left ──"


def test_a_printed_command_is_the_one_that_runs(monkeypatch, capsys):
    import jobs

    given = []
    monkeypatch.setattr(jobs.cli, "main", lambda arguments: given.append(arguments) or 0)
    jobs.liar("liar prune model \\\n    --keep 0.5")
    assert given == [["prune", "model", "--keep", "0.5"]]
    assert capsys.readouterr().out == "$ liar prune model \\\n    --keep 0.5\n"
    monkeypatch.setattr(jobs.cli, "main", lambda arguments: 2)
    with pytest.raises(SystemExit):
        jobs.liar("liar prune model")


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize("given", [None, "active"])
def test_make_lets_idle_threads_wait_without_spinning(target, given, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "policy: $OMP_WAIT_POLICY"\n')
    python.chmod(0o755)
    others = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        ["make", "-s", target, f"BIN={tmp_path}", "-o", "setup", "-o", ".cache/assets/.installed"],
        cwd=ROOT,
        env=others if given is None else {**others, "OMP_WAIT_POLICY": given},
        capture_output=True,
        text=True,
    )
    assert set(done.stdout.splitlines()) == {f"policy: {given or 'passive'}"}, done.stderr
