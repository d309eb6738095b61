"""``compress`` does what ``liar prune`` does, and says in Python's words what it can't use."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from tiny import tiny

import liar_ext
from liar_ext import InputError, Recipe, cli, compress

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


def test_it_repeats_a_recipe_block_by_block(llama_folder, corpus, tmp_path):
    recipe = Recipe(calibration=(str(corpus[0]),), samples=8, seq_len=16, schedule="one-pass")
    report = compress(llama_folder, recipe=recipe, max_memory="1GiB", out=tmp_path / "out")
    assert report.recipe.samples == 8 and (tmp_path / "out/model.safetensors").exists()
    with pytest.raises(InputError, match="exists"):
        compress(llama_folder, recipe=recipe, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"keeep": 0.5}, "compress: there is no keyword keeep; did you mean keep?"),
        ({"overwite": True}, "did you mean overwrite?"),
        ({"calibration": "a.txt"}, "calibration is no keyword in Python: give it as text"),
        ({"dry_run": True}, "liar prune --dry-run"),
        ({"max_memory": "12"}, "max_memory must be a number and a unit"),
        ({"text": None}, "needs text or a bank"),
        ({"model": tiny("llama")}, "got a LlamaForCausalLM; liar_ext.prune takes a loaded model"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\]"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_read(choices, message):
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
    with pytest.raises(InputError, match="save_pruned: needs the plan"):
        liar_ext.save_pruned(model, tmp_path / "other")
