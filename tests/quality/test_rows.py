"""Methods by name, what they share, how rows are kept, and the tables of them."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from covers import some
from tiny import VOCAB, tiny

from bench.common import write_whole
from bench.quality import models, peers, texts
from bench.quality.methods import FLAP, OTHERS, expand, read_method
from bench.quality.record import Record, alone_in
from bench.quality.report import markdown
from bench.quality.sharing import Case
from liar_ext import Recipe, prune, sites
from liar_ext.job import analysis
from liar_ext.job.preparing import settled_for
from liar_ext.system.errors import InputError


def test_names_of_methods():
    assert read_method("liar", keep=0.8, seed=1) == Recipe(keep=0.8, seed=1, tile=1)
    assert read_method(FLAP, keep=0.5, seed=0) == Recipe(
        keep=0.5,
        tile=1,
        criterion="wifv",
        allocation="global",
        reconstruct="bias",
        schedule="one-pass",
        self_text=0.0,
        random_tokens=0.0,
    )
    named = read_method("liar+layerwise+kinds=mlp+tile=auto+damp=0.1", keep=0.7, seed=0)
    assert named == Recipe(keep=0.7, schedule="layerwise", kinds=("mlp",), tile="auto", damp=0.1)
    assert read_method("liar+equal+batch_size=2", keep=0.7, seed=0) == Recipe(
        keep=0.7, tile=1, uniform_layers=True, batch_size=2
    )
    fewer = read_method("liar+blocks", keep=0.7, seed=0)
    assert fewer == Recipe(keep=1.0, keep_blocks=0.7, tile=1)
    assert expand(["liar", "others", FLAP]) == ["liar", *OTHERS]


@pytest.mark.parametrize(
    "name", ["liar+keep=0.5", "liar+samples=3", "liar+fast", "obs+curve", "liar+colour=1", "a+b+c"]
)
def test_wrong_names_are_refused(name):
    with pytest.raises(InputError):
        read_method(name, keep=0.8, seed=0)


@pytest.mark.parametrize(("family", "same"), [("gemma3_text", "one-pass"), ("llama", "layerwise")])
def test_one_job_by_two_names(family, same):
    jobs = {
        name: settled_for(read_method(f"liar{name}", keep=0.8, seed=0), sites(tiny(family)))
        for name in ("", "+one-pass", "+layerwise")
    }
    assert jobs[""] == jobs[f"+{same}"] and len(set(jobs.values())) == 2


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCAB, (16, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": rows, "fold": torch.arange(4) % 2} for rows in ids.split(4)]


METHODS = [
    "liar",
    "liar+one-pass",
    "liar+tile=4",
    "liar+damp=0.5",
    "liar+equal",
    "obs+curve+none",
    "taylor+uniform+linear",
    FLAP,
    "liar+attn_unit=head",
    "liar+kinds=mlp",
]


@some("name", ["llama", "opt"], "opt")
def test_methods_that_share_give_what_they_give_alone(name, monkeypatch):
    """Nothing is shared that a method would compute otherwise."""
    dense, calls = tiny(name), []
    measure = analysis.site_divergences
    monkeypatch.setattr(
        analysis,
        "site_divergences",
        lambda *given, **more: calls.append(given) or measure(*given, **more),
    )
    case = Case(dense, batches())
    shared = {}
    for method in [*METHODS, "liar"]:
        recipe = read_method(method, keep=0.6, seed=0)
        pruned, report, seconds = case.prune(recipe)
        shared[method] = pruned.state_dict(), report.plan, report
        assert seconds > case.calibrating
    # Those of liar, of another form and of other units; schedule, tile, damp, equal layers
    # and a choice of sites share liar's.
    assert len(calls) == 3 - (name == "opt")  # whose heads share no keys
    monkeypatch.undo()
    for method in METHODS:
        alone = tiny(name)
        report = prune(alone, batches(), read_method(method, keep=0.6, seed=0))
        weights, plan, found = shared[method]
        assert plan == report.plan, method
        for key, value in alone.state_dict().items():
            assert torch.equal(value, weights[key]), f"{method}: {key}"
        assert [r.sensitivity for r in found.sites] == [r.sensitivity for r in report.sites]
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in tiny(name).state_dict().items())


def row(method="liar", ratio=0.2, seed=0, perplexity=30.0, dense=26.97, **more):
    recipe = {} if method == "dense" else read_method(method, keep=1 - ratio, seed=seed).to_dict()
    found = {
        "tokens": 10,
        "dense": dense,
        "perplexity": perplexity,
        "bits_per_byte": 1.25,
        "kl": 0.5,
        "log_ratio": math.log(perplexity / dense),
    }
    return {
        "model": peers.MODEL,
        "weights": "w",
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "recipe": recipe,
        "calibration": ["valid"],
        "calibration_tokens": 32768,
        "calibration_digest": str(seed),
        "judged_digest": "j",
        "judged": {"seq_len": 512, "dtype": "bfloat16", "prompts": 64},
        "texts": {"wikitext-2": found},
        "choices": {"accuracy": 0.4, "questions": 100},
        "continuation": {"equal_tokens": 4.0, "equal_share": 0.125, "kl": 0.25},
        "summary": found["log_ratio"],
        "seconds": {"prune": 1.0, "judge": 1.0, "spent": 2.0},
        "removed": {"all": ratio, "attn": 0.033, "mlp": 0.255},
        **more,
    }


def test_rows_are_found_again(tmp_path):
    path = tmp_path / "quality.json"
    kept = Record(path)
    kept.add(row())
    kept.add(row(perplexity=31.0))
    kept.add(row(seed=1))
    again = Record(path)
    assert [r["texts"]["wikitext-2"]["perplexity"] for r in again.rows] == [31.0, 30.0]
    assert again.find(row())["texts"]["wikitext-2"]["perplexity"] == 31.0
    for other in (
        row(ratio=0.3),
        row("liar+layerwise"),
        row(weights="v"),
        row(judged_digest="k"),
        row(calibration_digest="x"),
    ):
        assert again.find(other) is None
    before = row()  # of a recipe that had one field less, and one that is gone
    del before["recipe"]["rescale"]
    before["recipe"]["refine"] = 0
    assert again.find(before) is not None
    before["recipe"]["schedule"] = "layerwise"  # the default was another one
    assert again.find(before) is None


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    write_whole(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"model": 1}]'])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "quality.json").write_text(content)
    with pytest.raises(InputError, match="must hold rows of this bench"):
        Record(tmp_path / "quality.json")


def test_one_run_at_a_time(tmp_path):
    with alone_in(tmp_path):
        with pytest.raises(InputError, match="another run writes"):
            with alone_in(tmp_path):
                pass
    with alone_in(tmp_path):
        pass


def test_tables():
    rows = [
        row("dense", 0.0, 0, 26.97),
        row(perplexity=30.0),
        row(perplexity=40.0, seed=1),
        row(FLAP, perplexity=43.6),
        row("liar+layerwise", perplexity=29.0),
    ]
    text = markdown(rows)
    geometric = math.sqrt(30 * 40)
    assert f"| `liar` | {geometric:.2f}, 1.250 (0.500) |" in text
    assert f"| `{FLAP}` (configuration of ours) |" in text
    gap, flap = math.log(geometric / 26.97), math.log(43.6 / 26.97)
    assert (
        f"| gap of `liar` / best gap of our configurations of others | {gap / flap:.2f} |" in text
    )
    grail = math.log(38.82 / 26.97)
    peer = "best gap of a peer's own code, calibrated on WikiText-2"
    assert f"| gap of `liar` / {peer} | {gap / grail:.2f} |" in text
    assert "Measured with the peers' own code" in text and "| FLAP | 43.6, 32.29 |" in text
    assert "| `liar` | 3.3, 25.5 |" in text
    assert "(dense 40.0)" in text and "| `liar` | 4.00 (0.250) |" in text


def test_peers_are_beside_the_same_text_only():
    assert peers.best(peers.MODEL, "web", 0.2, 18.71)[0] == "FLAP"
    assert peers.best(peers.MODEL, "web", 0.2, 19.0) is None
    assert peers.best(peers.MODEL, "code", 0.2, 10.7) is None
    assert peers.best("other", "web", 0.2, 18.71) is None
    assert peers.best(peers.MODEL, "web", 0.4, 18.71) is None


def test_parts_are_joined_and_checked(tmp_path):
    from hashlib import sha256

    for number in range(models.GEMMA_PARTS):
        folder = tmp_path / f"{models.GEMMA_PACKAGE}_part{number + 1}" / "data"
        folder.mkdir(parents=True)
        (folder / f"{models.GEMMA_FILE}.part{number:02}").write_text(f"part {number}, ")
    sums = tmp_path / models.GEMMA_PACKAGE / "data" / "SHA256SUMS"
    sums.parent.mkdir(parents=True)
    digest = sha256(b"part 0, part 1, part 2, part 3, ").hexdigest()
    sums.write_text(f"{digest}  {models.GEMMA_FILE}\n")
    models.join_parts(tmp_path / "whole", tmp_path)
    assert (tmp_path / "whole").read_text() == "part 0, part 1, part 2, part 3, "
    sums.write_text(f"{digest[::-1]}  {models.GEMMA_FILE}\n")
    with pytest.raises(InputError, match="make another file"):
        models.join_parts(tmp_path / "whole", tmp_path)
    (folder / f"{models.GEMMA_FILE}.part03").unlink()
    with pytest.raises(InputError, match="run: make gemma"):
        models.join_parts(tmp_path / "whole", tmp_path)


def test_texts_share_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(
        texts.assets, "collected_documents", lambda *k: [f"{k} {n} " * 30 for n in range(50)]
    )
    news = [f"title {n}\n\nbody {n} " * 30 for n in range(40)]
    monkeypatch.setattr(texts.assets, "news_documents", lambda: news)
    texts.write_texts(tmp_path)
    calibration, judged = texts.choose_texts(tmp_path, ["encyclopaedia", "news"], [], None)
    assert list(judged) == ["encyclopaedia", "web", "news", "code"]
    found = texts.Texts(calibration, judged)  # refuses what is in both
    assert list(map(len, found.calibration.values())) == [43, 35]
    assert list(map(len, found.judged.values())) == [7, 50, 5, 50]
    with pytest.raises(InputError, match="calibration text too"):
        texts.Texts(calibration, {"news": calibration["news"]})


def test_texts_of_ones_own(tmp_path):
    with pytest.raises(InputError, match="must hold wiki.test.raw"):
        texts.choose_texts(tmp_path, ["encyclopaedia"], [], tmp_path)
    for name in ("wiki.test.raw", "valid-unk.txt"):
        (tmp_path / name).write_text(name)
    calibration, judged = texts.choose_texts(tmp_path, ["encyclopaedia"], [], tmp_path)
    assert calibration == {"valid-unk": str(tmp_path / "valid-unk.txt")}
    assert list(judged) == ["wikitext-2", "web", "news", "code"]
    assert texts.choose_texts(tmp_path, ["x.txt"], ["a=b", "c=d=e"], None) == (
        {"x": "x.txt"},
        {"a": "b", "c": "d=e"},
    )
    for wrong in (["a"], ["=b"], ["a=b", "a=c"]):
        with pytest.raises(InputError, match="NAME=SOURCE"):
            texts.choose_texts(tmp_path, ["news"], wrong, None)


def test_json_of_rows_is_read_by_others(tmp_path):
    write_whole(tmp_path / "a.json", json.dumps([row()]))
    assert json.loads((tmp_path / "a.json").read_text())[0]["method"] == "liar"
