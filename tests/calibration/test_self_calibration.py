from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny import tiny

from liar_ext import InputError, cli
from liar_ext.calibration import generated
from liar_ext.calibration.generated import document_prefix, write_documents, write_sequences
from liar_ext.calibration.texts import calibration_sequences
from liar_ext.models.running import computes_bfloat16


def written(tokenizer, **how):
    return write_documents(tiny("llama"), tokenizer, **{"documents": 3, "tokens": 9} | how)


def test_the_seed_decides_and_the_callers_draws_go_on(tokenizer):
    model = tiny("llama")
    state = torch.random.get_rng_state()
    first = write_documents(model, tokenizer, documents=3, tokens=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == written(tokenizer) != written(tokenizer, seed=1)
    assert len(first) == 3 and all(0 < len(text.split()) <= 9 for text in first)


def test_tokens_follow_the_models_own_distribution(tokenizer, monkeypatch):
    model = tiny("llama").train()
    model.lm_head.eval()
    model.generation_config.update(temperature=0.01, top_k=1, do_sample=False)
    monkeypatch.setattr(generated, "MOST_ROWS", 4000)
    texts = write_documents(model, tokenizer, documents=4000, tokens=1)
    assert (
        model.training
        and not model.lm_head.training
        and model.generation_config.temperature == 0.01
    )
    model.eval()
    start = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        expected = model(start).logits[0, -1].softmax(-1)
    for letter in "aeiou":
        share = texts.count(letter) / len(texts)
        wanted = float(expected[tokenizer.convert_tokens_to_ids(letter)])
        assert share == pytest.approx(wanted, abs=4 * (wanted / len(texts)) ** 0.5)


@pytest.mark.parametrize(
    "said",
    [
        {"eos_token_id": list(range(40))},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_p": 0.9},
        {"suppress_tokens": list(range(20))},
        {"num_beams": 3},
    ],
    ids=lambda said: next(iter(said)),
)
def test_nothing_else_that_the_model_says_of_generation_holds(said, tokenizer):
    model = tiny("llama")
    wanted = write_documents(model, tokenizer, documents=8, tokens=12)
    model.generation_config.update(**said)
    assert write_documents(model, tokenizer, documents=8, tokens=12) == wanted
    assert said.items() <= model.generation_config.to_dict().items()


def test_a_token_is_drawn_where_the_number_falls(monkeypatch):
    chances = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    drawn = []
    for number in (0.0, 0.2, 0.25, 0.5, 0.75, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand_like", lambda total, n=number: torch.full_like(total, n))
        kept = generated._drawn(None, chances.log()[None])
        drawn.append(int(kept.argmax()))
        assert kept.isfinite().sum() == 1
    assert drawn == [4, 4, 3, 1, 1, 1]
    for broken in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="not finite"):
            generated._drawn(None, torch.tensor([[0.0, 1.0], [0.0, broken]]))


def test_documents_are_written_in_even_rounds_that_fit_in_memory(tokenizer, monkeypatch):
    rounds, draw = [], generated._draw
    monkeypatch.setattr(generated, "_draw", lambda *got: rounds.append(len(got[1])) or draw(*got))
    monkeypatch.setattr(generated, "MOST_ROWS", 3)
    assert len(written(tokenizer, documents=7)) == 7
    monkeypatch.setattr(generated, "CACHE_BYTES", 2 * generated._cached_bytes(tiny("llama"), 9))
    assert len(written(tokenizer, documents=3)) == 3
    monkeypatch.setattr(generated, "CACHE_BYTES", 1)
    assert len(written(tokenizer, documents=2)) == 2
    assert rounds == [3, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(("family", "most"), [("llama", 1), ("gemma3", 2), ("deepseek_v3", 6)])
def test_keys_and_values_are_counted(family, most):
    model = tiny(family)
    with torch.no_grad():
        cache = model(torch.arange(12)[None] % 16, use_cache=True).past_key_values
    kept = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert kept <= generated._cached_bytes(model, 12) <= most * kept


def patched(model) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("half", sorted({False, computes_bfloat16(torch.device("cpu"))}))
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_give_the_same_but_for_rounding(bias, half, monkeypatch):
    monkeypatch.setattr(generated, "computes_bfloat16", lambda _: half)
    model = tiny("llama", attention_bias=bias, mlp_bias=bias)
    ids = torch.arange(20).view(5, 4) % 16
    with torch.no_grad():
        expected = model(ids).logits
        with generated.packed(model, 5):
            found = model(ids).logits
            assert found.dtype == torch.float32
            off = (found - expected).norm() / expected.norm()
            assert off < (0.02 if half else 1e-5) and (off > 1e-4) == half
            supported = torch.backends.mkldnn.is_available()
            supported &= "AVX" in torch.backends.cpu.get_cpu_capability()
            assert len(patched(model)) == (22 if supported else 0)  # 7 a block, and the head
        assert torch.equal(model(ids).logits, expected) and not patched(model)


def test_layers_stay_as_they_are_after_an_error_without_memory_or_in_float64(monkeypatch):
    model = tiny("llama")
    with pytest.raises(ZeroDivisionError), generated.packed(model, 5):
        raise ZeroDivisionError
    assert not patched(model)
    for room in (None, 0):
        monkeypatch.setattr(generated, "available_memory", lambda room=room: room)
        with generated.packed(model, 5):
            assert not patched(model)
    monkeypatch.undo()
    by_onednn, packs = generated._by_onednn, iter([True, False])

    def short(*given):
        if next(packs):
            return by_onednn(*given)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(generated, "_by_onednn", short)
        with generated.packed(model, 5):
            assert not patched(model)
    with generated.packed(model.double(), 5):
        assert not patched(model)


def test_what_cannot_write_is_refused(tokenizer):
    with pytest.raises(
        InputError,
        match='"self" lets the model write .* BertForSequenceClassification can\'t; give',
    ):
        write_documents(tiny("bert"), tokenizer, documents=1, tokens=4)
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="probabilities that are not finite"):
        write_documents(broken, tokenizer, documents=1, tokens=4)


def test_sequences_are_those_tokens_in_turns(tokenizer):
    model = tiny("llama")
    drawn = write_sequences(model, tokenizer, count=5, seq_len=9, seed=3)
    assert drawn.input_ids.shape == (5, 9) and drawn.tokens == 45
    assert drawn.fold.tolist() == [0, 1, 0, 1, 0]
    prefix = document_prefix(tokenizer)
    assert drawn.input_ids[:, : len(prefix)].tolist() == 5 * [prefix]
    texts = write_documents(model, tokenizer, documents=5, tokens=9 - len(prefix), seed=3)
    assert tokenizer.batch_decode(drawn.input_ids, skip_special_tokens=True) == texts
    one = write_sequences(model, tokenizer, count=1, seq_len=9)
    assert one.fold.tolist() == [0, 1]  # both folds have some
    short = write_sequences(model, tokenizer, count=2, seq_len=11, written=3).input_ids
    short = short[:, len(prefix) :]
    assert torch.equal(short, short[:, :3].repeat(1, 4)[:, : short.shape[1]])


def test_sequences_beside_others_are_of_no_text(tokenizer):
    model = tiny("llama")
    text = calibration_sequences(
        [["ab" * 300] * 9, ["cd" * 300] * 9], tokenizer, samples=8, seq_len=12, random_tokens=0.5
    )
    both = text.beside(write_sequences(model, tokenizer, count=3, seq_len=12))
    assert both.source.tolist() == [*text.source.tolist(), -1, -1, -1]
    assert len(both) == 8 + 8 + 3 and both.bos == text.bos
    assert torch.equal(both.input_ids[:16], text.input_ids)
    (own,) = {len(batch["fold"].unique()) for batch in both.batches()}
    assert own == 1


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_document_begins_with_a_token_that_the_model_knows(token, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    model = tiny("llama")
    model.config.bos_token_id = model.config.eos_token_id = token
    assert write_sequences(model, bare, count=2, seq_len=9).input_ids.shape == (2, 9)


def test_tokens_of_other_inputs_are_never_written(tokenizer):
    model = tiny("llama")
    model.config.image_token_id = 7
    model.config.vision_start_token_id = 9
    ids = write_sequences(model, tokenizer, count=64, seq_len=64).input_ids
    assert not torch.isin(ids, torch.tensor([7, 9])).any()
    assert len(ids.unique()) > 20


def test_the_command_calibrates_on_what_the_model_writes(llama_folder, corpus, tmp_path, capsys):
    out = tmp_path / "pruned"
    options = ["--keep", "0.7", "--samples", "8", "--seq-len", "16", "--certify", "2", "--quiet"]
    sources = ["--calibration", "self", str(corpus[0])]
    assert cli.main(["prune", str(llama_folder), *sources, "--out", str(out), *options]) == 0
    report = json.loads((out / "liar/report.json").read_text())
    assert report["settings"]["calibration"] == ["self", str(corpus[0])]
    assert report["settings"]["calibration_sequences"] == 8
    assert all(site["certified_error"] is not None for site in report["sites"])
