from __future__ import annotations

import pytest
import torch
from covers import slow
from tiny import NARROWABLE, batches, tiny

from liar_ext import InputError, Recipe, cli, prune
from liar_ext.calibration import saved_sums
from liar_ext.job.planning import describe


def in_folds(model) -> list[dict]:
    return [{**b, "fold": torch.full((8,), i // 3)} for i, b in enumerate(batches(model))]


CHOICES = (
    {},
    {"allocation": "uniform"},
    {"schedule": "layerwise"},
    {"keep_hidden": 0.8},
    {"keep_hidden": 0.8, "keep": 1.0},
    {"reconstruct": "affine", "kinds": ["mlp"]},
)
JOBS = [
    (pytest.param if family == "llama" or (family == "vit" and not choices) else slow)(
        family, choices
    )
    for family in ("llama", "bert", "opt", "gpt2", "vit", "gemma3")
    for choices in CHOICES
    if family in NARROWABLE or "keep_hidden" not in choices
]
JOBS += [
    ("mixtral", {"keep_experts": 0.75}),
    ("olmoe", {"keep_experts": 0.5, "keep": 1.0}),
]
JOBS += [("mixtral", {}), ("gpt_oss", {"allocation": "global", "tile": 1})]


@pytest.mark.parametrize(("family", "choices"), JOBS)
def test_it_says_how_the_result_loads_and_leaves_the_model_alone(family, choices):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe(**{"keep": 0.7, **choices})
    lines = describe(model, in_folds(model), recipe)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert lines[-1] == f"loading: {prune(model, in_folds(model), recipe).loading}"


def test_it_says_the_passes_that_the_job_takes(monkeypatch):
    model = tiny("llama")
    for memory, schedule in ((None, "one-pass"), (20_000, "one-pass"), (20_000, "layerwise")):
        recipe = Recipe(keep=0.7, memory=memory, schedule=schedule)
        lines = describe(tiny("llama"), in_folds(model), recipe)
        said = next(line for line in lines if line.startswith("passes"))
        taken = prune(tiny("llama"), in_folds(model), recipe).settings["calibrate_passes"]
        assert said == f"passes over the calibration text: {taken} to calibrate"


def test_an_encoder_with_a_decoder_needs_text_for_one_alone():
    ids = torch.arange(3, 35).reshape(4, 8)
    lines = describe(tiny("t5"), [{"input_ids": ids}], Recipe(keep=0.7))
    assert any(line.startswith("time: about") for line in lines)


def test_it_refuses_what_the_job_would():
    model = tiny("llama")
    with pytest.raises(InputError, match="no plan keeps 0.01"):
        describe(model, in_folds(model), Recipe(keep=0.01))


def test_a_dry_run_needs_no_folder_and_writes_none(llama_folder, corpus, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    job = ["prune", str(llama_folder), "--calibration", str(corpus[0]), "--dry-run"]
    assert cli.main([*job, "--samples", "8", "--seq-len", "16", "--keep", "0.7"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    assert ["attn", "3", "4", "kv", "groups", "3"] == rows[2][:6]
    assert "mlp 3 24 channels 14 2 to 24 in steps of 2".split() in rows
    for word in ("calibrate ", "sensitivity ", "memory (GiB): ", "time: about", "loading:"):
        assert f"\n{word}" in said
    assert sorted(tmp_path.iterdir()) == before


def test_an_estimate_covers_every_site(monkeypatch):
    """With sums that are taken in groups, the first group may lack a kind of site."""
    model = tiny("llama")
    assert len(saved_sums.group_sites(list(_sites(model)), 9_000)) > 3
    lines = describe(model, in_folds(model), Recipe(keep=0.7, memory=9_000))
    assert any(line.startswith("time: about") for line in lines)


def _sites(model):
    from liar_ext import sites

    return sites(model)


OF_MIXTURES = {
    "qwen2_moe": {
        "mlp 1 4 experts of 16 channels": "8",
        "shared mlp 1 12 channels": "6",
        "mlp 1 24 channels": "12",
    },
    "deepseek_v3": {
        "mlp 1 24 channels": "12",
        "mlp 2 4 experts of 16 channels": "8",
        "shared mlp 2 16 channels": "8",
    },
}


@pytest.mark.parametrize("family", OF_MIXTURES)
def test_it_tells_experts_from_mlps_that_every_token_passes(family):
    """Each kind of MLP has a row, with its own size and what it can keep."""
    recipe = Recipe(keep=0.5, kinds=("mlp",), tile=1)
    lines = describe(tiny(family), in_folds(tiny(family)), recipe)
    rows = [" ".join(line.split()).split(" channels ") for line in lines if "channels" in line]
    assert {f"{row[0]} channels": row[1].split()[0] for row in rows} == OF_MIXTURES[family]


def test_it_counts_layers_of_experts():
    lines = describe(tiny("mixtral"), in_folds(tiny("mixtral")), Recipe(keep=0.5, kinds=("mlp",)))
    assert any("mlp 2 4 experts of 32 channels" in " ".join(line.split()) for line in lines)


def test_it_says_that_layers_of_one_size_may_need_no_code():
    """Fewer heads of BERT need code, fewer channels don't."""
    model = tiny("bert")
    for kinds, how in (((), "The stock class cannot build"), (("mlp",), "The saved folder loads")):
        recipe = Recipe(keep=0.7, uniform_layers=True, **({"kinds": kinds} if kinds else {}))
        said = describe(model, in_folds(model), recipe)[-1]
        assert said.startswith(f"loading, with the sizes of the same fraction everywhere: {how}")
