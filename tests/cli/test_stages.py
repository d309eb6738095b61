"""The stages that a job shows count from 1 to n, each once, whatever the job is."""

from __future__ import annotations

import pytest
from byte_level import TOKENS, byte_level_tokenizer
from command import run
from covers import slow
from tiny import tiny

from liar_ext.system.progress import Bar, Timeline

WALKS = ["--max-memory", "4GiB", "--self-text", 0]


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """A tiny Llama whose tokenizer can lose tokens."""
    path = tmp_path_factory.mktemp("models") / "llama"
    byte_level_tokenizer(each.read_text() for each in corpus).save_pretrained(path)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny("llama", vocab_size=TOKENS, **ids).save_pretrained(path)
    return path


@pytest.fixture
def numbers(monkeypatch):
    """The numbers of the bars of jobs, in order."""
    found, begin = [], Timeline.begin

    def note(*given):
        found.append(begin(*given))
        return found[-1]

    monkeypatch.setattr(Timeline, "begin", note)
    return found


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (8, []),  # balanced, which measures both schedules
        slow(7, ["--schedule", "layerwise"]),
        (7, ["--schedule", "one-pass"]),
        (4, ["--preset", "fast"]),
        slow(6, ["--preset", "fast", "--criterion", "taylor", "--rescale"]),
        (8, ["--keep-vocab", 384]),
        (10, ["--keep-hidden", 0.5, "--reconstruct", "linear"]),
        (5, [*WALKS, "--schedule", "layerwise"]),
        slow(5, [*WALKS, "--schedule", "one-pass"]),
        (4, [*WALKS, "--preset", "fast"]),
    ],
)
def test_stages_count_from_1_to_n(count, options, numbers, folder, corpus, tmp_path):
    sizes = ["--keep", 0.7, "--samples", 32, "--seq-len", 16, "--eval-samples", 4]
    texts = ["--calibration", corpus[0], "--eval", corpus[1]]
    command = ["prune", folder, *texts, *sizes, "--progress", "plain", "--out", tmp_path / "out"]
    assert run(*command, *options) == 0
    assert numbers == [f"[{at}/{count}]" for at in range(1, count + 1)]


def test_a_resumed_job_leaves_out_what_is_done(numbers, folder, corpus, tmp_path, monkeypatch):
    """It goes on with the number of the stage where it was stopped."""
    sizes = ["--keep", 0.7, "--samples", 32, "--seq-len", 16, "--schedule", "layerwise"]
    command = ["prune", folder, "--calibration", corpus[0], *sizes, "--progress", "plain"]
    command += ["--out", tmp_path / "out", "--checkpoint", tmp_path / "kept"]
    begin = Bar.__init__

    def stop(self, *given, **named):
        begin(self, *given, **named)
        if named.get("desc") == "layerwise":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "__init__", stop)
        assert run(*command) == 130
    assert numbers == [f"[{at}/5]" for at in range(1, 6)]
    numbers.clear()
    assert run("resume", tmp_path / "kept", "--progress", "plain") == 0
    assert numbers == ["[5/5]"]
