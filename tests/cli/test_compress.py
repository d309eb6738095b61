"""``compress`` does what ``liar prune`` does, and says in Python's words what it can't use."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file
from tiny import batches, tiny

import liar_ext
from liar_ext import InputError, Recipe, cli, compress
from liar_ext.checkpoint import placing

SHORT = {"samples": 8, "seq_len": 16, "self_text": 0.0, "preset": "fast"}


def test_it_gives_the_folder_of_the_command(llama_folder, corpus, tmp_path, capfd):
    seen, more = [], {"keep": 0.5, "sites": "mlp", **SHORT}
    report = compress(
        llama_folder,
        text=corpus[0],
        out=tmp_path / "small",
        eval=str(corpus[1]),
        eval_samples=2,
        progress=lambda *step: seen.append(step[0]),
        **more,
    )
    assert capfd.readouterr() == ("", "") and {"calibrate", "reconstruct"} <= set(seen)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    texts = ["--calibration", str(corpus[0]), "--eval", str(corpus[1]), "--eval-samples", "2"]
    out = ["--out", str(tmp_path / "command"), "--quiet"]
    assert cli.main(["prune", str(llama_folder), *texts, *words, *out]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "command"))
    assert all(one[name].equal(other[name]) for name in other)
    assert report.recipe == Recipe.load(tmp_path / "command/liar/recipe.yaml")
    assert report.evaluation["pruned"]["perplexity"] > 1


def test_it_repeats_a_recipe_block_by_block_and_warns_of_a_full_disk(
    llama_folder, corpus, tmp_path, monkeypatch
):
    recipe = Recipe(calibration=(str(corpus[0]),), samples=8, seq_len=16, schedule="one-pass")
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda _: used._replace(free=1 << 10))
    with pytest.warns(UserWarning, match="GiB free, and the model takes"):
        report = compress(llama_folder, recipe=recipe, max_memory="8GiB", out=tmp_path / "out")
    assert report.recipe.samples == 8 and (tmp_path / "out/model.safetensors").exists()
    with pytest.raises(InputError, match="exists"):
        compress(llama_folder, recipe=recipe, out=tmp_path / "out")


def test_a_saved_recipe_is_repeated_or_says_which_text_changed(
    llama_folder, corpus, tmp_path, capsys
):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text, source in zip(texts, (corpus[0], corpus[1]), strict=True):
        text.write_text(source.read_text())
    compress(llama_folder, text=texts, out=tmp_path / "out", **SHORT)
    saved = str(tmp_path / "out/liar/recipe.yaml")
    assert Recipe.load(saved).text_digests.keys() == {str(text) for text in texts}
    again = ["prune", "--recipe", saved, "--quiet", "--out"]
    assert cli.main([*again, str(tmp_path / "again")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(one[name].equal(other[name]) for name in one)
    texts[1].write_text(texts[1].read_text() + " more")
    assert cli.main([*again, str(tmp_path / "third")]) == 2
    said = capsys.readouterr().err
    assert "two.txt changed since the job of this recipe" in said and "one.txt" not in said
    given = ["--calibration", *map(str, texts)]
    assert cli.main([*again, str(tmp_path / "third"), *given]) == 0


def test_the_recipe_of_a_job_in_python_says_what_it_lacks(tmp_path, capsys):
    model = tiny("llama")
    liar_ext.prune(model, batches(model), keep=0.7, preset="fast").save(tmp_path)
    saved = str(tmp_path / "liar/recipe.yaml")
    assert cli.main(["prune", "MODEL", "--recipe", saved, "--out", "out"]) == 2
    assert "needs --calibration TEXT" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"keeep": 0.5}, "compress: there is no keyword keeep; did you mean keep?"),
        ({"sparsity": 0.5}, "there is no keyword sparsity; did you mean keep, the"),
        ({"dataset": "t"}, "there is no keyword dataset; did you mean text?"),
        ({"overwite": True}, "did you mean overwrite?"),
        ({"calibration": "a.txt"}, "calibration is no keyword in Python: give it as text"),
        ({"max_memory": "12"}, "max_memory must be a number and a unit"),
        ({"max_memory": 8e9}, "max_memory must be a number and a unit, .* got 8000000000.0"),
        ({"heal": True}, "heal must be a number of minutes, or 5m, got True"),
        ({"heal": float("nan")}, "heal must be a number of minutes, got nan"),
        ({"heal": 1e30}, "heal must be a number of minutes, got 1e\\+30"),
        ({"out": ""}, "out must be a folder to write, got ''"),
        ({"out": None}, "out must be a folder to write, got None"),
        ({"text": None}, "needs text or a bank"),
        ({"model": tiny("llama")}, "got a LlamaForCausalLM; liar_ext.prune takes a loaded model"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\]"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_read(
    choices, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        compress(**{"model": "nowhere", "text": "nowhere.txt", "out": "out", **choices})


def test_the_version_is_that_of_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.split()[-1] == liar_ext.__version__


def test_the_lines_of_the_readme_need_no_plan_and_take_paths(corpus, tokenizer, tmp_path):
    documents = liar_ext.read_documents(corpus[0])
    assert documents == liar_ext.read_documents(str(corpus[0]))
    drawn = liar_ext.calibration_sequences([documents], tokenizer, samples=8, seq_len=16)
    model = tiny("llama")
    report = liar_ext.prune(model, drawn.batches(), keep=0.7, preset="fast")
    liar_ext.save_pruned(model, tmp_path / "out", report=report)
    assert liar_ext.Plan.load(tmp_path / "out/liar/plan.json") == report.plan
    liar_ext.save_pruned(model, tmp_path / "other")  # by the plan that is left on the model
    assert liar_ext.Plan.load(tmp_path / "other/liar/plan.json") == report.plan
    with pytest.raises(InputError, match="save_pruned: needs the plan"):
        liar_ext.save_pruned(tiny("llama"), tmp_path / "dense")
