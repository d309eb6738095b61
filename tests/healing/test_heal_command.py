"""``liar heal`` from a pruned folder to a healed one."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from byte_level import TOKENS, byte_level_tokenizer
from command import quick
from stopping import stop_at
from tiny import tiny

from liar_ext import InputError, Report, cli, compress, load_model, load_pruned, verify_pruned
from liar_ext.checkpoint.carrying import compare_tokenization
from liar_ext.checkpoint.folder import EXPORTS_FILE, add_to_manifest, strangers
from liar_ext.cli import inputs
from liar_ext.cli.heal import small
from liar_ext.export import export
from liar_ext.healing import MINUTES
from liar_ext.healing import heal as runs
from liar_ext.healing import training as weights_of_healing
from liar_ext.system.progress import no_bars

NUMBERS = ("--train", "all", "--lr", "3e-3", "--batch-size", "4")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Compute in float32 whatever the hardware has, without the bars of loading."""
    monkeypatch.setattr("liar_ext.healing.heal.computes_bfloat16", lambda _: False)
    with no_bars():
        yield


@pytest.fixture(scope="module")
def saved(llama_folder, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "pruned"
    job = quick(llama_folder, corpus[0], out, "--keep", 0.5, "--eval", corpus[1], "--quiet")
    assert cli.main(job) == 0
    return out


@pytest.fixture
def pruned(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pruned")
    return tmp_path / "pruned"


def heal(*arguments):
    return cli.main(["heal", *map(str, (*arguments, *NUMBERS))])


def section(folder):
    return json.loads((folder / "liar/report.json").read_text())["heal"]


def weights(folder):
    return load_pruned(folder).state_dict()


def same(folder, other):
    one, two = weights(folder), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_is_replaced_by_a_healed_one(pruned, saved, llama_folder, capsys):
    before = json.loads((saved / "liar/report.json").read_text())
    assert heal(pruned, "--tokens", "4k", "--overwrite") == 0
    printed = capsys.readouterr().out
    found = section(pruned)
    assert found["improved"] and found["after"] < found["before"]
    assert 4000 <= found["tokens"] < 4128 and found["budget"] == "4,000 tokens"
    assert found["teacher"] == str(llama_folder) and found["train"] == "all"
    assert found["curve"][0] == [0, found["before"]] and len(found["curve"]) == 5
    assert not same(pruned, saved) and not strangers(pruned)
    assert verify_pruned(pruned)
    # What pruning alone reached stays as it was; what healing did stands apart.
    after = json.loads((pruned / "liar/report.json").read_text())
    assert before.pop("heal") == {} and after.pop("heal") == found
    assert after == before
    dense, pruned_before, healed = found["quality"]["perplexity"]
    assert dense == pytest.approx(before["evaluation"]["dense"]["perplexity"])
    assert pruned_before == pytest.approx(before["evaluation"]["pruned"]["perplexity"])
    assert healed < pruned_before
    said = f"held-out loss {found['before']:.4g} → {found['after']:.4g}"
    report, card = Report.load(pruned), (pruned / "README.md").read_text()
    assert said in printed and said in report.summary() and said in card
    assert "## Healing" in report.to_markdown() and "before healing" in card
    assert "without retraining" not in card
    assert "repeats the pruning. The settings of `liar heal`" in card
    assert "Repeat the job, but for the healing, by" in report.to_markdown()
    before_card = (saved / "README.md").read_text()
    assert "without retraining" in before_card and "recipe.yaml` repeats it." in before_card
    assert (pruned / "liar/recipe.yaml").read_text() == (saved / "liar/recipe.yaml").read_text()
    # Once more, with what was done before in the notes.
    assert heal(pruned, "--steps", "1", "--quiet") == 0
    assert any("Healed before" in line for line in section(pruned)["notes"])


def test_one_note_says_that_text_is_repeated(pruned, tmp_path, capsys):
    assert heal(pruned, "--tokens", "20k", "--out", tmp_path / "long") == 0
    _, note = section(tmp_path / "long")["notes"]  # the first: of a single document
    assert re.fullmatch(r"The text is read \d+ times: give more text or fewer tokens\.", note)
    assert note in capsys.readouterr().out
    assert heal(pruned, "--tokens", "1k", "--out", tmp_path / "short") == 0
    assert len(section(tmp_path / "short")["notes"]) == 1


def test_a_run_without_gain_leaves_the_weights_and_says_so(pruned, tmp_path, capsys):
    out = tmp_path / "healed"
    assert heal(pruned, "--steps", "3", "--lr", "50", "--out", out, *NUMBERS[:2]) == 0
    # The last --lr counts: it is that of NUMBERS.
    assert section(out)["improved"]
    other = tmp_path / "worse"
    command = ["heal", pruned, "--steps", "3", "--lr", "50", "--out", other]
    assert cli.main([*map(str, command)]) == 0
    assert not section(other)["improved"] and same(other, pruned)
    assert "without gain" in capsys.readouterr().out
    assert "without gain" in (other / "README.md").read_text()
    assert verify_pruned(other)


def test_batches_are_cut_into_some_512_tokens():
    whole = [
        {"input_ids": torch.arange(7 * 128).view(7, 128)},  # 896 tokens: 4 sequences, and 3
        {"input_ids": torch.arange(3 * 600).view(3, 600)},  # no sequence is cut
        {"input_ids": torch.ones(4, 4).long(), "attention_mask": torch.zeros(4, 4).long()},
    ]
    cut = list(small(whole))
    assert [len(each) for each in cut] == [4, 3, 1, 1, 1, 4]
    for at, parts in enumerate((cut[:2], cut[2:5], cut[5:])):
        found = torch.cat([each.inputs["input_ids"] for each in parts])
        assert torch.equal(found, whole[at]["input_ids"])
    assert torch.equal(torch.cat([each.fold for each in cut[:2]]), torch.arange(7) % 2)


def test_an_interrupted_command_goes_on(pruned, tmp_path, monkeypatch):
    whole, out, place = tmp_path / "whole", tmp_path / "out", tmp_path / "checkpoint"
    command = (pruned, "--steps", "8", "--grad-accumulation", "2", "--quiet")
    assert heal(*command, "--out", whole) == 0
    monkeypatch.setattr(runs.Checkpoint, "due", lambda *_: True)

    with monkeypatch.context() as patch:
        stop_at(patch, runs.Healing, "step", 6)
        assert heal(*command, "--out", out, "--checkpoint", place) == 130
    assert place.exists() and not out.exists()
    assert heal(*command, "--out", out, "--checkpoint", place) == 0
    assert same(out, whole) and not place.exists()
    with monkeypatch.context() as patch:  # without a checkpoint the best state is saved
        stop_at(patch, runs.Healing, "step", 6)
        assert heal(*command, "--out", out, "--overwrite") == 130
    assert section(out)["interrupted"] and section(out)["steps"] == 5
    assert section(out)["improved"] and verify_pruned(out)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_resume_goes_on_with_it(is_in_place, pruned, tmp_path, monkeypatch, capsys):
    shutil.copytree(pruned, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    more = ("--steps", "8", "--self-text", "0.25", "--quiet")
    assert heal("other", *more, "--out", "whole") == 0
    place = ("--checkpoint", "checkpoint")
    monkeypatch.setattr(runs.Checkpoint, "due", lambda *_: True)

    out = () if is_in_place else ("--out", "out")
    with monkeypatch.context() as patch:
        stop_at(patch, runs.Healing, "step", 6)
        assert heal("pruned", *more, *out, *place) == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(inputs, "write_sequences", lambda *_, **__: pytest.fail("written"))
    assert cli.main(["resume", "../checkpoint"]) == 0
    assert "../checkpoint: liar heal, " in capsys.readouterr().out
    result = tmp_path / ("pruned" if is_in_place else "out")
    assert same(result, tmp_path / "whole") and not (tmp_path / "checkpoint").exists()


def test_an_encoder_is_healed(tokenizer, corpus, tmp_path):
    tiny("distilbert").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "pruned"
    more = ("--keep", 0.5, "--eval", corpus[1], "--quiet")
    assert cli.main(quick(tmp_path / "model", corpus[0], out, *more)) == 0
    evaluation = Report.load(out).evaluation
    assert heal(out, "--steps", "8", "--quiet") == 0
    assert section(out)["improved"] and verify_pruned(out)
    dense, pruned_before, healed = section(out)["quality"]["cosine"]
    assert dense == 1.0 and pruned_before == pytest.approx(evaluation["pruned"]["cosine"])
    assert 0.5 < healed < 1.0 and healed != pruned_before


def test_prune_trains_its_result_if_asked(llama_folder, corpus, tmp_path, capsys):
    short = {"keep": 0.5, "samples": 16, "seq_len": 32, "preset": "fast", "eval": str(corpus[1])}
    report = compress(llama_folder, corpus[0], out=tmp_path / "one", heal="1s", **short)
    assert report.heal["budget"] == f"{1 / 60:,} minutes" and report.heal["steps"] > 0
    words = [f"--{name.replace('_', '-')}={value}" for name, value in short.items()]
    words += ["--heal", "1s", "--json", "--progress", "none"]
    command = ["prune", llama_folder, "--calibration", corpus[0], "--out", tmp_path / "two"]
    assert cli.main([*map(str, command), *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = section(tmp_path / "two")
    assert printed["heal"]["after"] == found["after"] <= found["before"]
    assert len(found["quality"]["perplexity"]) == 3 and verify_pruned(tmp_path / "two")


def test_prune_says_that_its_training_was_interrupted(llama_folder, corpus, tmp_path, monkeypatch):
    command = quick(llama_folder, corpus[0], tmp_path / "out", "--heal", "1m")
    with monkeypatch.context() as patch:
        stop_at(patch, runs.Healing, "step", 3)
        assert cli.main(command) == 130
    assert section(tmp_path / "out")["interrupted"] and verify_pruned(tmp_path / "out")


def test_training_after_pruning_goes_on(llama_folder, corpus, tmp_path, monkeypatch, capsys):
    """The checkpoint was once of the pruning alone."""
    monkeypatch.chdir(tmp_path)
    command = quick(llama_folder, corpus[0], "out", "--keep", 0.5, "--heal", "1s")
    command += ["--checkpoint", "place"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "due", lambda *_: True)
        stop_at(patch, runs.Healing, "step", 3)
        assert cli.main(command) == 130
    assert (tmp_path / "place").exists() and section(tmp_path / "out") == {}
    assert cli.main(command) == 2
    assert "hint: liar resume place goes on with it" in capsys.readouterr().err
    assert cli.main(["resume", "place"]) == 0
    assert "liar heal, out, stopped with healing after" in capsys.readouterr().out
    found = section(tmp_path / "out")
    assert found["steps"] > 2 and found["budget"] == f"{1 / 60:,} minutes"
    assert verify_pruned(tmp_path / "out") and not (tmp_path / "place").exists()


@pytest.mark.exhaustive
def test_the_preset_best_trains_where_it_can(llama_folder, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MINUTES, "best", 0.02)
    short = {"keep": 0.5, "samples": 16, "seq_len": 32, "self_text": 0.0, "overwrite": True}
    command = {"preset": "best", "out": tmp_path / "out", **short}
    assert compress(llama_folder, corpus[0], **command).heal["budget"] == "0.02 minutes"
    assert compress(llama_folder, corpus[0], heal=0, **command).heal == {}
    # Too little memory to train: pruned all the same, with the reason.
    monkeypatch.setattr(weights_of_healing, "available_memory", lambda: 1000)
    report = compress(llama_folder, corpus[0], **command)
    assert report.heal == {} and (tmp_path / "out/model.safetensors").exists()
    (said,) = [line for line in report.warnings if "did not train" in line]
    assert "training takes" in said and "are free" in said
    with pytest.raises(InputError, match="train fewer weights.*out is pruned and saved"):
        compress(llama_folder, corpus[0], heal="1s", **command)
    with pytest.raises(InputError, match="heal must be a number of minutes, got -1"):
        compress(llama_folder, corpus[0], heal=-1, **command)
    words = ["prune", llama_folder, "--calibration", corpus[0], "--preset", "best", "--dry-run"]
    capsys.readouterr()
    assert cli.main([*map(str, words), "--samples", "4", "--seq-len", "32"]) == 0
    assert "training: 0.02 min" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, why",
    [
        ("--max-memory=8GiB", "no room"),
        ("--bank=x.bank", "no text"),
        ("--out={}", "--out replaces"),
    ],
)
def test_prune_refuses_to_train_where_it_cant(
    option, why, llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    command = ["prune", llama_folder, "--calibration", corpus[0], "--out", tmp_path / "out"]
    # Of the folder itself: were it a pruned one, it could be replaced.
    command += [option.format(llama_folder), "--overwrite"]
    monkeypatch.setattr("liar_ext.cli.prune.check_folder", lambda *_: None)
    assert cli.main([*map(str, command), "--heal", "5m"]) == 2
    said = capsys.readouterr().err
    assert "--heal trains the whole model" in said and why in said
    cli.main([*map(str, command), "--preset", "best", "--eval", "/no/where"])
    said = capsys.readouterr().err
    assert "warning: the preset does not train the result" in said and why in said
    for wrong in ("5", "-1m", "5 days", ""):
        with pytest.raises(SystemExit):
            cli.main([*map(str, command), f"--heal={wrong}"])
        assert "such as 5m, 1h or 90s" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_dense_model_writes_text_if_asked(pruned, tmp_path):
    out = tmp_path / "healed"
    assert heal(pruned, "--steps", "2", "--self-text", "0.5", "--out", out, "--quiet") == 0
    assert section(out)["self_text"] == 0.5


@pytest.fixture(scope="module")
def fewer(corpus, tmp_path_factory):
    """A folder whose text chose its tokens, and the dense one."""
    dense, out = (tmp_path_factory.mktemp("fewer") / name for name in ("dense", "pruned"))
    byte_level_tokenizer(each.read_text() for each in corpus).save_pretrained(dense)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny("llama", vocab_size=TOKENS, **ids).save_pretrained(dense)
    more = ("--keep", 0.8, "--keep-vocab", 384, "--quiet")
    assert cli.main(quick(dense, corpus[0], out, *more)) == 0
    return dense, out


def test_the_tokens_are_those_of_the_folder_whatever_the_text(fewer, corpus, tmp_path, monkeypatch):
    """The dense model once kept those that the new text would choose."""
    seen = []

    def look(model, teacher, batches, **_):
        seen.append((teacher.get_input_embeddings().weight, batches))
        raise InputError("heal: seen")

    monkeypatch.setattr("liar_ext.cli.heal.heal", look)
    folder, out = fewer[1], tmp_path / "out"
    assert heal(folder, "--steps", "2", "--calibration", corpus[1], "--out", out) == 2
    ((rows, batches),) = seen
    kept = json.loads((folder / "liar/vocabulary.json").read_text())["kept"]
    dense = load_model(fewer[0])[0].get_input_embeddings().weight
    assert len(kept) < len(dense) and torch.equal(rows, dense[kept])
    assert max(int(each.inputs["input_ids"].max()) for each in batches) < len(kept)


def test_a_folder_with_fewer_tokens_is_healed_and_pruned_again(fewer, corpus, tmp_path):
    first, second, third = (tmp_path / name for name in "123")
    assert heal(fewer[1], "--steps", "2", "--eval", corpus[1], "--out", first) == 0
    notes = Report.load(first).heal["notes"]
    assert any("measured with the smaller vocabulary" in note for note in notes)
    assert heal(first, "--steps", "2", "--out", second) == 0 and verify_pruned(second)
    assert compare_tokenization(second)
    assert cli.main(quick(second, corpus[0], third, "--keep", 0.8, "--quiet")) == 0
    assert heal(third, "--steps", "2") == 0 and verify_pruned(third)
    assert section(third)["teacher"] == str(second)


def test_fewer_tokens_are_found_by_name_in_each_model_before(fewer, corpus, tmp_path):
    """The list of the folder has their numbers in the model that lost some before."""
    again = tmp_path / "again"
    unequal = ("--allocation", "curve", "--tile", 1)
    more = ("--keep", 0.5, "--keep-vocab", 320, *unequal, "--quiet")
    assert cli.main(quick(fewer[1], corpus[0], again, *more)) == 0
    (uniform,) = export(again, "uniform", tmp_path / "uniform").paths
    assert not strangers(uniform) and compare_tokenization(uniform)
    for folder in (again, uniform):
        for teacher in fewer:
            assert heal(folder, "--steps", "2", "--teacher", teacher) == 0
        assert section(folder)["improved"] and verify_pruned(folder)


def test_a_teacher_with_other_tokens_is_refused(pruned, fewer, corpus, tmp_path, capsys):
    more = ("--keep", 1, "--keep-vocab", 320, "--quiet")
    assert cli.main(quick(fewer[0], corpus[0], tmp_path / "least", *more)) == 0
    load_model(fewer[0])[1].save_pretrained(tmp_path / "t5")
    tiny("t5", vocab_size=TOKENS).save_pretrained(tmp_path / "t5")
    short = quick(tmp_path / "t5", corpus[0], tmp_path / "two", "--keep", 0.8, "--quiet")
    assert cli.main(short) == 0
    for folder, teacher, said in (
        (tmp_path / "two", fewer[0], "has other inputs than"),
        (pruned, fewer[0], "reads text as other tokens"),
        (fewer[1], tmp_path / "least", "lacks tokens of"),
        (pruned, pruned, "is the folder to train"),
    ):
        assert heal(folder, "--steps", "1", "--teacher", teacher, "--out", f"{folder}-2") == 2
        error = capsys.readouterr().err
        assert said in error and "name the model that was pruned with --teacher" in error


def test_a_gguf_file_is_a_teacher(fewer, tmp_path):
    export(fewer[0], "gguf", tmp_path / "dense.gguf")
    command = (fewer[1], "--steps", "1", "--teacher", tmp_path / "dense.gguf")
    assert heal(*command, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (None, "is damaged; copy the folder again"),
        ([], "is damaged"),
        ([0.5], "is damaged"),
        ([True], "is damaged"),
        ([-1, 0], "lacks tokens of"),
        ([0, 0], "lacks tokens of"),
        ([10**9], "lacks tokens of"),
    ],
)
def test_a_list_of_tokens_that_was_changed_is_refused(kept, said, fewer, tmp_path, capsys):
    folder = shutil.copytree(fewer[1], tmp_path / "pruned")
    facts = json.loads((folder / "liar/vocabulary.json").read_text())
    (folder / "liar/vocabulary.json").write_text(json.dumps(facts | {"kept": kept}))
    assert heal(folder, "--steps", "1", "--out", tmp_path / "out") == 2
    assert said.replace("; ", "\nhint: ") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plan", ['{"version"', "{}"])
def test_a_plan_that_is_none_is_named(plan, pruned, capsys):
    (pruned / "liar/plan.json").write_text(plan)
    assert heal(pruned, "--steps", "1") == 2
    error = capsys.readouterr().err
    assert str(pruned) in error and "plan.json" in error
    assert "\nhint: copy" in error and error.endswith("again\n")


def test_a_dense_model_that_is_gone_can_be_named(pruned, tmp_path, capsys):
    report = json.loads((pruned / "liar/report.json").read_text())
    report["recipe"]["model"] = str(tmp_path / "gone")
    (pruned / "liar/report.json").write_text(json.dumps(report))
    assert heal(pruned, "--steps", "1", "--out", tmp_path / "out") == 2
    assert "gone doesn't exist\nhint:" in (error := capsys.readouterr().err)
    assert "name the model that was pruned with --teacher" in error


def test_all_healings_are_remembered_and_exports_are_old_then(pruned, capsys):
    (pruned / EXPORTS_FILE).write_text("{}")
    add_to_manifest(pruned, EXPORTS_FILE)
    for _ in range(3):
        assert heal(pruned, "--steps", "1", "--overwrite") == 0
    notes = section(pruned)["notes"]
    assert sum(note.startswith("Healed before: Trained") for note in notes) == 2
    first, second, third = capsys.readouterr().out.split("saved")[:3]
    assert "liar export made" in first and "liar export made" not in second
    assert ", pruned " in first and ", before " in second and ", before " in third


def test_exports_are_not_old_after_a_run_without_gain(pruned, capsys):
    (pruned / EXPORTS_FILE).write_text("{}")
    add_to_manifest(pruned, EXPORTS_FILE)
    assert cli.main(["heal", str(pruned), "--steps", "3", "--lr", "50", "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "without gain" in said and "liar export made" not in said


def test_what_cant_be_is_refused(pruned, corpus, llama_folder, tmp_path, capsys):
    def refused(*arguments, said):
        before = section(pruned)
        assert heal(*arguments) == 2
        assert said in capsys.readouterr().err
        assert section(pruned) == before and not strangers(pruned)

    one = ("--steps", "1", "--quiet")
    refused(pruned, *one, "--calibration", corpus[1], said="documents are in the calibration text")
    refused(llama_folder, *one, said="no liar/report.json")
    refused(pruned, *one, "--out", llama_folder, said="exists")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused(pruned, *one, "--checkpoint", tmp_path / "other", said="new or empty folder")
    refused(pruned, *one, "--checkpoint", pruned / "inside", said="must not lie")
    text = tmp_path / "short.txt"
    text.write_text("abc def " * 20)
    refused(pruned, *one, "--calibration", text, said="an eighth can't be held out")
    report = json.loads((pruned / "liar/report.json").read_text())
    report["recipe"] |= {"model": None, "calibration": []}
    (pruned / "liar/report.json").write_text(json.dumps(report))
    assert heal(pruned, *one, "--out", tmp_path / "new") == 2
    assert "does not name the dense model (--teacher MODEL) and text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["", "--tokens 0", "--tokens 5G", "--tokens 1k --steps 3", "--minutes -1", "--steps 1 --lr 0"],
)
def test_wrong_numbers_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["heal", "folder", *words.split()])
    assert error.value.code == 2 and "error: " in capsys.readouterr().err
