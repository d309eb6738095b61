"""Tasks of lm-eval on saved folders: local task files, without any network."""

from __future__ import annotations

import json
import math
import re
import sys

import folders
import pytest
import torch
from choice_tasks import write_choices
from tiny import tiny

from liar_ext import save_pruned
from liar_ext.cli.main import main

ITEMS = [
    {"question": "abcabcab", "choices": ["c", "x", "q"], "answer": 0},
    {"question": "the cat sat on the", "choices": ["mat", "zzz"], "answer": 1},
    {"question": "one two three fo", "choices": ["ur", "xq", "pp"], "answer": 2},
    {"question": "count 1 2 3", "choices": ["4", "a"], "answer": 0},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks(tmp_path):
    """A folder with one task file."""
    folder = tmp_path / "tasks"
    write_choices(folder, "letters", ITEMS)
    return folder


@pytest.fixture
def pruned(tmp_path, tokenizer):
    model, plan = folders.pruned("llama")
    save_pruned(model, tmp_path / "pruned", plan, tokenizer=tokenizer)
    return model, tmp_path / "pruned"


def by_hand(model, tokenizer):
    """Return the share of items where the right continuation is the likeliest one."""
    right = 0
    for item in ITEMS:
        scores = []
        for choice in item["choices"]:
            context = tokenizer(item["question"])["input_ids"]
            whole = tokenizer(f"{item['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole)))
            )
        right += scores.index(max(scores)) == item["answer"]
    return right / len(ITEMS)


def test_a_local_task_on_a_pruned_folder(pruned, tasks, tokenizer, tmp_path, capsys):
    model, folder = pruned
    output = tmp_path / "result.json"
    arguments = ["eval", str(folder), "--tasks", "letters", "--include-path", str(tasks)]
    assert main([*arguments, "--quiet", "--out", str(output)]) == 0
    captured = capsys.readouterr()
    assert "|letters|" in captured.out and "acc" in captured.out and "git" not in captured.err
    result = json.loads(output.read_text())
    assert result["tasks"]["letters"]["acc"] == pytest.approx(by_hand(model, tokenizer))
    assert math.isfinite(result["tasks"]["letters"]["acc_stderr"])
    assert result["items"] == {"letters": 4} and result["model"] == str(folder)


@pytest.mark.exhaustive
def test_limit_and_json(llama_folder, tasks, capsys):
    arguments = ["eval", str(llama_folder), "--tasks", "letters", "--include-path", str(tasks)]
    assert main([*arguments, "--limit", "2", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == {"letters": 2}


def test_bad_tasks_are_one_line(llama_folder, tasks, tmp_path, capsys, monkeypatch):
    few = tmp_path / "few"  # in place of lm-eval's thousands
    write_choices(few, "letter", ITEMS)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(few / "manager.py"))
    broken = tmp_path / "broken"
    write_choices(broken, "letters", [])
    (broken / "letters.jsonl").unlink()
    text = tmp_path / "none.yaml"
    cases = {
        "lm-eval knows no task 'leters'; did you mean letters": ("leters", tasks),
        "must be a folder of task files": ("letters", text),
        "a task can't be loaded": ("letters", broken),
    }
    for message, (name, folder) in cases.items():
        code = main(
            ["eval", str(llama_folder), "--tasks", name, "--include-path", str(folder), "--quiet"]
        )
        said = "; ".join(re.split(r"\n(?:hint: )?", capsys.readouterr().err.strip()))
        assert code == 2 and message in said, said


def test_options_of_the_other_kind_are_refused(llama_folder, corpus, tasks, capsys):
    model = str(llama_folder)
    for arguments, message in (
        (["--text", str(corpus[1]), "--limit", "2"], "--limit goes with --tasks"),
        (["--text", str(corpus[1]), "--include-path", str(tasks)], "--include-path goes with"),
        (["--tasks", "letters", "--samples", "2"], "--samples goes with --text"),
    ):
        assert main(["eval", model, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(llama_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(llama_folder), "--tasks", "letters"]) == 2
    assert "pip install 'datasets>=3.0' 'lm-eval>=0.4.9'" in capsys.readouterr().err


def test_an_encoder_has_no_tasks(tmp_path, tokenizer, tasks, capsys):
    tiny("bert").save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    arguments = ["--tasks", "letters", "--include-path", str(tasks), "--quiet"]
    assert main(["eval", str(tmp_path / "bert"), *arguments]) == 2
    assert "needs a causal language model" in capsys.readouterr().err
