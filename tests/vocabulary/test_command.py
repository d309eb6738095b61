"""``liar prune --keep-vocab``: a folder that any loader takes, with its own tokenizer."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch
import transformers
from byte_level import TOKENS, byte_level_tokenizer
from tiny import batches, tiny

from liar_ext import (
    InputError,
    Recipe,
    Report,
    choose_tokens,
    cli,
    compress,
    keep_tokens,
    load_model,
    prune,
    save_pruned,
)
from liar_ext.checkpoint.carrying import compare_tokenization
from liar_ext.export import export
from liar_ext.export.verify import verify_everywhere
from liar_ext.job.vocabulary import LOSSES, shares_budget, split_warnings
from liar_ext.vocabulary.keep import Counted
from liar_ext.vocabulary.pieces import choose

KEPT = 384
SHORT = ["--samples", "8", "--seq-len", "16", "--quiet", "--self-text", "0"]
QUICK = ["--schedule", "one-pass", "--allocation", "uniform"]


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """A tiny Llama with a trained byte-level tokenizer, and files of a slow one beside it."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = byte_level_tokenizer(each.read_text() for each in corpus)
    assert len(tokenizer) == TOKENS
    tokenizer.save_pretrained(path)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny("llama", vocab_size=TOKENS, **ids).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(b"all tokens of the dense model")
    (path / "merges.txt").write_text("a b\n")
    return path


def run(folder, corpus, out, *more: str) -> int:
    texts = ["--calibration", str(corpus[0])]
    return cli.main(["prune", str(folder), *texts, *SHORT, "--out", str(out), *more])


@pytest.fixture(scope="module")
def alone(folder, corpus, tmp_path_factory):
    """The folder with a smaller vocabulary, and nothing else removed."""
    out = tmp_path_factory.mktemp("out") / "alone"
    assert run(folder, corpus, out, "--keep-vocab", str(KEPT), "--keep", "1") == 0
    return out


def test_plain_transformers_loads_it(alone, folder, corpus):
    model = transformers.AutoModelForCausalLM.from_pretrained(alone)
    tokenizer = transformers.AutoTokenizer.from_pretrained(alone)
    assert model.config.vocab_size == len(tokenizer) == KEPT
    assert model.lm_head.weight.shape[0] == KEPT
    # All that stays of the dense model computes the same.
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    old = transformers.AutoTokenizer.from_pretrained(folder)
    kept = json.loads((alone / "liar/vocabulary.json").read_text())["kept"]
    ids = tokenizer.encode(corpus[0].read_text()[:90])
    expected = dense(torch.tensor([[kept[at] for at in ids]])).logits[..., kept]
    torch.testing.assert_close(model(torch.tensor([ids])).logits, expected)
    for text in corpus[0].read_text().split()[:40]:
        before, after = old.encode(text), tokenizer.encode(text)
        assert tokenizer.decode(after) == text
        if set(before) <= set(kept):
            assert [kept[at] for at in after] == before
    assert tokenizer.eos_token_id == model.config.eos_token_id == 1


def test_a_special_token_without_a_row_stays_without_one(folder, tmp_path, corpus):
    """As Gemma 3 without its images has one for them."""
    model, tokenizer = load_model(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == TOKENS == model.config.vocab_size
    texts = [corpus[0].read_text()]
    with pytest.raises(InputError, match=f"the text has token {TOKENS}, and the tokens of"):
        choose_tokens(model, tokenizer, [*texts, "a <image>"], KEPT)
    choice = choose_tokens(model, tokenizer, texts, KEPT)
    assert len(choice.order) == KEPT and TOKENS not in choice.order
    smaller = keep_tokens(model, tokenizer, choice)
    smaller.save_pretrained(tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == KEPT
    for each in (smaller, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert len(each) == KEPT + 1 and each.convert_tokens_to_ids("<image>") == KEPT
        assert max(each.encode(texts[0])) < KEPT


def test_the_folder_says_what_was_done(alone):
    assert not {"tokenizer.model", "merges.txt", "vocab.json"} & {p.name for p in alone.iterdir()}
    report = Report.load(alone)
    assert (report.vocabulary["before"], report.vocabulary["after"]) == (TOKENS, KEPT)
    assert report.vocabulary["kind"] == "byte-level BPE"
    assert report.params["before"] - report.params["after"] == 40 * (TOKENS - KEPT)
    assert any("tokenizer.model" in each and "stay behind" in each for each in report.warnings)
    for page in ("README.md", "liar/report.md"):
        assert "384 of 512 tokens stay (byte-level BPE)" in (alone / page).read_text()
    assert "25% of the tokens" in (alone / "liar/report.md").read_text()


@pytest.mark.usefixtures("quick_workers")
def test_llama_cpp_reads_the_smaller_vocabulary(alone, tmp_path):
    """Its file was run before it was put in place; verify runs it again beside the folder."""
    small = shutil.copytree(alone, tmp_path / "small")
    assert cli.main(["export", str(small), "--to", "gguf", "--quiet"]) == 0
    found = verify_everywhere(small)
    assert found["agrees"] and any("gguf" in row.how for row in found["rows"])
    reader = gguf.GGUFReader(small.with_suffix(".gguf"))
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == KEPT
    assert len(reader.fields["tokenizer.ggml.merges"].data) < TOKENS - 256


def test_a_dry_run_says_it_too(folder, corpus, tmp_path, capsys):
    assert run(folder, corpus, tmp_path / "out", "--keep-vocab", str(KEPT), "--dry-run") == 0
    assert "vocabulary: 384 of 512 tokens stay (byte-level BPE)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_workers")
def test_verify_compares_tokenization(alone, tmp_path):
    assert verify_everywhere(alone)["tokenizer_agrees"] is True
    other = shutil.copytree(alone, tmp_path / "other")
    facts = json.loads((other / "tokenizer.json").read_text())
    facts["model"]["merges"] = facts["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(facts))
    found = verify_everywhere(other)
    assert found["tokenizer_agrees"] is False and not found["agrees"]
    assert all(row.agrees for row in found["rows"])  # the weights are right
    (other / "liar/vocabulary.json").write_text('{"checks": [{}]}')
    with pytest.raises(InputError, match="damaged"):
        compare_tokenization(other)


def test_a_uniform_export_has_the_list_of_tokens_among_its_files(folder, corpus, tmp_path):
    small, out = tmp_path / "small", tmp_path / "uniform"
    how = ["--keep-vocab", str(KEPT), "--keep", "0.6", "--schedule", "one-pass", "--tile", "1"]
    assert run(folder, corpus, small, *how) == 0
    export(small, "uniform", out, progress=False)
    lists = [json.loads((each / "liar/vocabulary.json").read_text()) for each in (small, out)]
    assert lists[0] == lists[1]
    assert "liar/vocabulary.json" in (out / "liar/manifest.json").read_text()


def test_it_goes_with_heads_and_channels(folder, corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the quick brown fox jumps over the lazy dog\n")
    report = compress(
        folder,
        corpus[0],
        out=tmp_path / "out",
        keep_vocab=0.75,
        vocab_text=(str(corpus[0]), str(other)),
        keep=0.6,
        samples=8,
        seq_len=16,
        self_text=0.0,
        eval=str(corpus[1]),
        eval_samples=4,
    )
    again = Report.load(tmp_path / "out")
    assert again.vocabulary == json.loads(json.dumps(again.vocabulary))
    held_out = again.vocabulary["held_out"]
    before, after = held_out["bits_per_byte"]
    assert before > 0 and after > 0
    assert held_out["pruned"]["bits_per_byte"][1] != pytest.approx(after)
    assert again.vocabulary["text"] == [str(corpus[0]), str(other)]
    assert report.recipe.keep_vocab == 0.75
    assert report.recipe.text_digests.keys() == {*map(str, corpus), str(other)}
    assert compare_tokenization(tmp_path / "out")


@pytest.fixture(scope="module")
def documents(corpus, tmp_path_factory):
    """The words of the corpus as short documents."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    words = corpus[0].read_text().split()
    some = (" ".join(words[at : at + 20]) for at in range(0, len(words), 20))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return path


def test_auto_takes_what_loses_little_and_says_what_it_tried(
    folder, documents, tmp_path, monkeypatch
):
    monkeypatch.setitem(LOSSES, "bits_per_byte", 10.0)  # a tiny model has no knee
    more = ["--keep-vocab", "auto", "--keep", "1", "--vocab-scripts", "greek", "--seq-len", "64"]
    assert run(folder, [documents], tmp_path / "out", *more) == 0
    report = Report.load(tmp_path / "out")
    auto, held_out = report.vocabulary["auto"], report.vocabulary["held_out"]
    assert report.vocabulary["after"] == 320 == auto["curve"][0][0]  # 259 must stay
    before, after = held_out["bits_per_byte"]
    assert auto["curve"][0][1] == pytest.approx(after / before - 1, abs=1e-4)
    assert (auto["judged_by"], auto["most_loss"]) == ("bits_per_byte", 10.0)
    assert report.recipe.vocab_scripts == ("greek",) and report.recipe.keep_vocab == "auto"
    page = (tmp_path / "out/liar/report.md").read_text()
    assert "## Sizes of the vocabulary" in page and "| 320 |" in page
    assert compare_tokenization(tmp_path / "out")


def test_tokens_heads_and_channels_share_a_budget_of_parameters(
    folder, documents, tmp_path, capsys
):
    more = ["--of", "params", "--keep", "0.8", "--tile", "1", "--seq-len", "32", *QUICK]
    out = tmp_path / "shared"
    assert run(folder, [documents], out, "--keep-vocab", "auto", *more) == 0
    report = Report.load(out)
    curve = {size: (loss, kept) for size, loss, _, kept in report.vocabulary["auto"]["curve"]}
    assert len(curve) > 2 and report.vocabulary["after"] == min(curve, key=curve.get)
    model, _ = load_model(out)
    before, after = report.params["before"], sum(each.numel() for each in model.parameters())
    assert before == sum(each.numel() for each in load_model(folder)[0].parameters())
    assert 0.75 * before < after <= 0.8 * before
    # The fewer tokens, the more is left of heads and channels.
    kept = [curve[size][1] for size in sorted(curve)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    assert "kept by heads and channels alone" in (out / "liar" / "report.md").read_text()
    # Tokens alone can meet the budget, and a dry run has nothing to measure it on.
    alone = ["--keep-vocab", str(KEPT), *more, "--keep", "0.99"]
    assert run(folder, [documents], tmp_path / "alone", *alone) == 0
    params = Report.load(tmp_path / "alone").params
    assert params["prunable_after"] == params["prunable_before"] and params["after"] < before
    assert (
        run(folder, [documents], tmp_path / "no", "--keep-vocab", "auto", *more, "--dry-run") == 2
    )
    assert "give a number of tokens, or leave --dry-run out" in capsys.readouterr().err
    # What no size can meet is said of the budget, not of the last size that was tried.
    more += ["--keep-vocab", "auto", "--keep", "0.01"]
    assert run(folder, [documents], tmp_path / "no", *more) == 2
    assert "no plan keeps 0.01 of params" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "shared"),
    [({}, True), ({"keep": 1.0}, False), ({"of": "prunable"}, False)]
    + [
        ({"keep_hidden": 0.75}, False),
        ({"keep_experts": 0.5}, False),
        ({"keep_vocab": 0.5}, False),
    ],
)
def test_a_budget_is_shared_where_it_counts_all_parameters(more, shared):
    given = {"of": "params", "keep": 0.5, "keep_vocab": "auto"} | more
    assert shares_budget(Recipe(**given)) is shared


def test_a_sweep_has_one_vocabulary_for_all_budgets(folder, corpus, tmp_path, capsys):
    start = ["sweep", str(folder), "--calibration", str(corpus[0]), *SHORT, *QUICK]
    start += ["--eval", str(corpus[1]), "--keep", "0.9", "0.6", "--out", str(tmp_path / "s")]
    capsys.readouterr()
    assert cli.main([*start, "--keep-vocab", str(KEPT), "--json"]) == 0
    whole = load_model(folder)[0].num_parameters()
    assert json.loads(capsys.readouterr().out)["dense"]["params"] == whole
    found = set()
    for keep in (0.9, 0.6):
        report = Report.load(tmp_path / "s" / f"keep-{keep}")
        model, tokenizer = load_model(tmp_path / "s" / f"keep-{keep}")
        assert len(tokenizer) == KEPT == model.config.vocab_size == report.vocabulary["after"]
        held_out = report.vocabulary["held_out"]
        found |= {each["bits_per_byte"][1] for each in (held_out, held_out["pruned"])}
    assert len(found) == 3  # the dense model's, which both have, and those of two pruned ones
    assert cli.main([*start, "--keep-vocab", "auto", "--of", "params"]) == 2
    assert "takes another vocabulary for each budget" in capsys.readouterr().err


def test_auto_keeps_all_tokens_if_each_size_loses_too_much(
    folder, documents, tmp_path, monkeypatch
):
    monkeypatch.setitem(LOSSES, "bits_per_byte", -1.0)
    assert run(folder, [documents], tmp_path / "out", "--keep-vocab", "auto", *QUICK) == 0
    report = Report.load(tmp_path / "out")
    assert report.vocabulary["after"] == report.vocabulary["before"] == TOKENS
    assert any("All tokens stay" in each for each in report.warnings)
    assert "of the tokens" not in report.verdict().rows[0][1]
    assert not (tmp_path / "out/liar/vocabulary.json").exists()
    assert "All 512 tokens stay" in (tmp_path / "out/README.md").read_text()


def test_more_tokens_than_there_are_is_all_of_them(folder, corpus, tmp_path):
    assert run(folder, corpus, tmp_path / "out", "--keep-vocab", "32k", *QUICK) == 0
    report = Report.load(tmp_path / "out")
    assert not report.vocabulary
    said = "All tokens stay: --keep-vocab 32,768 removes none."
    assert report.warnings.count(said) == 1


@pytest.fixture(scope="module")
def encoder(folder, corpus, tmp_path_factory):
    """A tiny BERT with the tokenizer, pruned with fewer tokens, and texts that it was judged by."""
    at = tmp_path_factory.mktemp("encoder")
    transformers.BertModel(tiny("bert", vocab_size=TOKENS).config).save_pretrained(at / "dense")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(at / "dense")
    words = corpus[1].read_text().split()
    lines = [" ".join(words[start : start + 9]) for start in range(0, 180, 9)]
    (at / "held_out.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    rows = zip(lines, lines[1:], strict=False)
    (at / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    more = ["--keep-vocab", str(KEPT), "--keep", "0.6", *QUICK]
    assert run(at / "dense", corpus, at / "small", *more, "--eval", str(at / "held_out.jsonl")) == 0
    return at


def test_an_encoder_is_compared_with_the_dense_one_and_all_its_tokens(encoder, capsys):
    found = Report.load(encoder / "small").evaluation["pruned"]
    lines = (encoder / "held_out.jsonl").read_text().splitlines()
    rows = []
    for name in ("dense", "small"):
        model, tokenizer = load_model(encoder / name)
        inputs = [
            tokenizer(json.loads(line)["text"], max_length=16, truncation=True) for line in lines
        ]
        ids = [torch.tensor([each["input_ids"]]) for each in inputs]
        with torch.no_grad():
            rows.append(torch.cat([model(each).last_hidden_state.mean(1) for each in ids]))
    expected = torch.nn.functional.cosine_similarity(*rows).mean().item()
    assert found["cosine"] == pytest.approx(expected, rel=1e-4) and expected < 0.99

    def evaluated(folder, *options) -> dict:
        command = ["eval", str(encoder / folder), "--seq-len", "16", "--json", "--quiet"]
        assert cli.main([*command, *options]) == 0
        return json.loads(capsys.readouterr().out)

    again = evaluated("small", "--text", str(encoder / "held_out.jsonl"))
    assert again.pop("against") == str(encoder / "dense")
    assert again == pytest.approx(found, rel=1e-4)
    pairs = ["--pairs", str(encoder / "pairs.jsonl")]
    dense = evaluated("dense", *pairs)
    assert evaluated("small", *pairs)["dense_recall_at_1"] == dense["recall_at_1"]


def test_a_sweep_says_that_the_dense_model_has_fewer_tokens(folder, corpus, capsys):
    command = ["sweep", str(folder), "--calibration", str(corpus[0]), "--eval", str(corpus[1])]
    more = ["--keep", "0.9", "--keep-vocab", str(KEPT), "--json", *QUICK]
    assert cli.main([*command, *SHORT, *more]) == 0
    notes = json.loads(capsys.readouterr().out)["warnings"]
    assert any("measured with the smaller vocabulary" in note for note in notes)
    assert any(note.startswith("Bits per byte of held-out text: ") for note in notes)


def test_tokens_of_a_script_stay_whole(folder, corpus, tmp_path, capsys):
    """All tokens of the corpus are Latin, and do not fit."""
    more = ["--keep-vocab", "384", "--vocab-scripts", "latin"]
    assert run(folder, corpus, tmp_path / "out", *more) == 2
    assert "tokens must stay" in capsys.readouterr().err


def test_text_that_splits_more_than_that_which_chose_is_told_of():
    assert split_warnings([0.2, 0.201], {}) == []
    assert split_warnings([0.2, 0.22], {"tokens_per_byte": [0.2, 0.209]}) == []
    (said,) = split_warnings([0.2, 0.22], {})
    assert "10% more tokens for the text. Name" in said
    (said,) = split_warnings([0.2, 0.202], {"tokens_per_byte": [0.2, 0.208]})
    assert "4% more tokens for the held-out text, and 1% more for the text that chose it" in said


def test_the_same_job_again_and_a_smaller_one_after_it(alone, corpus, tmp_path):
    recipe = ["--recipe", str(alone / "liar/recipe.yaml"), "--quiet", "--out", str(tmp_path / "b")]
    assert cli.main(["prune", *recipe]) == 0
    for name in ("model.safetensors", "tokenizer.json", "liar/vocabulary.json"):
        assert (tmp_path / "b" / name).read_bytes() == (alone / name).read_bytes()
    assert run(alone, corpus, tmp_path / "d", "--keep", "0.7", *QUICK) == 0
    names = "tokenizer.json", "liar/vocabulary.json"  # of all tokens that are left
    assert all((tmp_path / "d" / n).read_bytes() == (alone / n).read_bytes() for n in names)
    more = "--keep-vocab", "320", "--keep", "0.7", *QUICK
    assert run(alone, corpus, tmp_path / "c", *more) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "c", trust_remote_code=True
    )
    assert model.config.vocab_size == 320 and compare_tokenization(tmp_path / "c")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep-vocab", "128"], "at least 259 of 512 tokens must stay"),
        (["--keep-vocab", "3"], "got 64, a multiple of 64\nhint: keep 320 or more"),
        (["--keep-vocab", "many"], "must be a fraction in"),
        (["--keep-vocab", "0.75", "--max-memory", "1GiB"], "--max-memory"),
        (["--keep-vocab", "auto", "--vocab-text", "short.txt"], "auto holds out a fifth"),
        (["--vocab-scripts", "klingon", "--keep-vocab", "auto"], "must name Unicode scripts"),
        (["--vocab-text", "a.txt"], "--vocab-text and --vocab-scripts decide which tokens go"),
        (["--keep-vocab", "0.75", "--vocab-text", "self"], "name a text with --vocab-text"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    folder, corpus, tmp_path, capsys, monkeypatch, more, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    assert run(folder, corpus, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"keep": float("nan")}, "keep must be a fraction"),
        ({"keep": "auto"}, "keep must be a fraction or a number of tokens, got 'auto'"),
        ({"scripts": ["klingon"]}, "name Unicode scripts such as"),
        ({"scripts": "latin"}, "scripts must be a list of texts"),
        ({"texts": "a text"}, "texts must be a list of texts"),
    ],
)
def test_what_cannot_choose_tokens_is_refused_in_python(choices, message, folder):
    given = {"texts": ["a text"], "keep": KEPT, **choices}
    with pytest.raises(InputError, match=message):
        choose_tokens(*load_model(folder), **given)


def test_an_order_that_a_tokenizer_cannot_have_is_refused(folder):
    model, tokenizer = load_model(folder)
    tokenizer.add_tokens(["<extra>"])
    rows, whole = model.get_input_embeddings(), list(range(TOKENS))
    for order in ([], [*whole, 0], [-1, *whole], [TOKENS, *whole], [*whole, TOKENS + 1]):
        with pytest.raises(InputError, match="tokens of the tokenizer, each once"):
            keep_tokens(model, tokenizer, order)
    assert model.get_input_embeddings() is rows and len(rows.weight) == TOKENS


def test_in_python_text_is_drawn_afterwards(folder, corpus, tmp_path):
    model, tokenizer = load_model(folder)
    with pytest.raises(InputError, match="keep_vocab is no keyword in Python"):
        prune(model, batches(model), keep_vocab=0.5)
    with pytest.raises(InputError, match="draw the batches with its tokenizer"):
        prune(model, batches(model), Recipe(keep_vocab=0.5))
    assert choose_tokens(model, tokenizer, ["text"], 1.0) is None
    chosen = choose_tokens(model, tokenizer, [corpus[0].read_text()], KEPT)
    smaller = keep_tokens(model, tokenizer, chosen)
    assert len(tokenizer) == TOKENS and len(smaller) == KEPT
    report = prune(model, batches(model), keep=0.8, schedule="one-pass", allocation="uniform")
    for wrong in (None, tokenizer):
        with pytest.raises(InputError, match="the tokenizer is not the one without them"):
            save_pruned(model, tmp_path / "out", report=report, tokenizer=wrong)
    save_pruned(model, tmp_path / "out", report=report, tokenizer=smaller)
    assert compare_tokenization(tmp_path / "out")


def test_a_language_model_says_which_unseen_tokens_stay(folder):
    model, tokenizer = load_model(str(folder))
    texts = ["the weather", " ", "a day"]
    rows = [
        model(**tokenizer(text, return_tensors="pt")).logits[0] for text in (texts[0], texts[2])
    ]
    wanted = torch.cat(rows).double().softmax(-1).mean(0)
    counted = Counted(model, tokenizer, texts)
    torch.testing.assert_close(torch.from_numpy(counted.expected), wanted, atol=1e-6, rtol=1e-4)
    seen = set(counted.counts.nonzero()[0])
    kept = set(counted.choose(KEPT).order)
    assert seen <= kept
    alone = choose(counted.pieces, counted.counts, KEPT, counted.needed)
    assert wanted[sorted(kept - alone)].sum() > wanted[sorted(alone - kept)].sum()
    encoder = Counted(tiny("bert", vocab_size=TOKENS), tokenizer, texts)
    assert not encoder.expected.any()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(InputError, match="predictions on the text are not finite"):
        Counted(model, tokenizer, texts).choose(KEPT)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        """No tokenizer of the library."""

    with pytest.raises(InputError, match=r"Slow has no tokenizer\.json"):
        choose_tokens(tiny("llama"), Slow(), ["text"], 0.5)
