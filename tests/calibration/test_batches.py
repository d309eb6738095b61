from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tiny_inputs

from liar_ext import (
    Budget,
    InputError,
    apply_plan,
    calibrate,
    prune,
    reconstruct_layerwise,
    score,
    sites,
    sweep,
)
from liar_ext.calibration.batches import Batch, Sequences, probe_batches, read_batches
from liar_ext.models.running import positions_of
from liar_ext.selection.allocation import allocate

IDS = torch.ones(2, 3).long()


def test_every_form_of_a_batch_is_read_alike():
    ids = torch.arange(12).view(3, 4)
    labels = {"labels": ids, "start_positions": ids[:, 0], "end_positions": ids[:, 1]}
    mask = torch.ones_like(ids)
    bare, plain, whole = read_batches(
        [ids, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, **labels}]
    )
    for batch in (bare, plain, whole):
        assert batch.mask is None and len(batch) == 3
        assert set(batch.inputs) <= {"input_ids", "attention_mask"}
        assert batch.counting(12, ids.device).all()
    assert whole.labels.keys() == labels.keys() and not bare.labels and not plain.labels
    assert [batch.fold.tolist() for batch in (bare, plain, whole)] == [[0, 1, 0], [1, 0, 1]] + [
        [0, 1, 0]
    ]
    assert next(read_batches([bare])) is bare


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (torch.arange(12).view(3, 4), "must be a list of batches, got Tensor"),
        (Sequences({"input_ids": torch.zeros(4, 8).long()}, torch.arange(4) % 2), "got Sequences"),
        ([torch.zeros(3, 4)], r"int32 or int64 .* got float32 of shape \(3, 4\)"),
        ([torch.zeros(3, 4, dtype=torch.uint8)], "got uint8 of shape"),
        ([torch.arange(4)], r"got int64 of shape \(4,\)"),
        ([torch.zeros(3, 0).long()], r"of shape \(3, 0\)"),
    ],
)
def test_what_are_no_batches(batches, said):
    for use in (prune, calibrate):
        with pytest.raises(InputError, match=f"batches: .*{said}"):
            use(tiny("llama"), batches)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [("vit", "input_ids", "pixel_values"), ("llama", "pixel_values", "input_ids")],
)
def test_a_batch_of_another_kind_of_model_is_refused(name, given, said):
    batch = {given: torch.ones(2, 8, dtype=torch.long)}
    with pytest.raises(InputError, match=f"reads {said}, got {given}; give batches with {said}"):
        calibrate(tiny(name), [batch])


@pytest.mark.parametrize("wrong", [-1, 1000])
def test_a_token_that_the_model_lacks_is_named(wrong):
    model = tiny("llama")
    ids = torch.full((4, 8), 3)
    ids[2, 5] = wrong
    with pytest.raises(InputError, match=f"has token {wrong}, and the tokens of LlamaForCausalLM"):
        prune(model, [ids])


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (partial(torch.compile, backend="eager"), "is wrapped; give model._orig_mod"),
        (lambda model: get_peft_model(model, LoraConfig()), "give model.merge_and_unload()"),
        (torch.nn.DataParallel, "is wrapped; give model.module"),
    ],
)
def test_a_wrapped_model_is_refused_before_anything_is_done(wrap, said):
    model = tiny("llama")
    inputs, report = [tiny_inputs(model)], prune(copy.deepcopy(model), [tiny_inputs(model)])
    wrapped = wrap(model)
    for use in (
        lambda: prune(wrapped, inputs, keep=0.5),
        lambda: calibrate(wrapped, inputs),
        lambda: sweep(wrapped, inputs),
        lambda: apply_plan(wrapped, report.plan),
    ):
        with pytest.raises(InputError, match=said):
            use()


def test_folds_and_padding_are_those_of_the_batch():
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    fold = torch.tensor([1, 1, 0], dtype=torch.int32)
    (batch,) = read_batches([{"input_ids": ids, "attention_mask": mask, "fold": fold}])
    assert batch.fold.tolist() == [1, 1, 0] and batch.fold.dtype == torch.long
    assert torch.equal(batch.mask, mask.bool())
    some = batch.select([2, 0])
    assert torch.equal(some.inputs["input_ids"], ids[[2, 0]]) and some.fold.tolist() == [0, 1]
    assert some.counting(8, ids.device).tolist() == [True] * 4 + [True, True, False, False]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 2]]}, "got input_ids of type list"),
        ([1, 2], "got input_ids of type list"),
        ("some text", r"got input_ids of type str; calibration_sequences\("),
        ({"fold": torch.zeros(2)}, "holds no input of the model"),
        ({"input_ids": IDS, "fold": torch.tensor([0, 2])}, r"fold must be 0 or 1"),
        ({"input_ids": IDS, "fold": torch.tensor([0])}, r"each of 2 .* got \[0\]"),
        ({"input_ids": IDS, "fold": torch.tensor([0.5, 1])}, "fold must be 0 or 1"),
        ({"input_ids": IDS, "source": torch.zeros(3)}, "source must be a whole number for each"),
    ],
)
def test_anything_else_is_no_batch(batch, message):
    with pytest.raises(InputError, match=message):
        list(read_batches([batch]))


def test_sequences_of_another_fold_are_not_dropped_in_silence():
    model = tiny("llama")
    batch = tiny_inputs(model, batch=6)
    bank = calibrate(model, [batch])
    plan = allocate(sites(model), score(model, bank, sites(model), "wifv"), Budget(0.7), "uniform")
    with pytest.raises(InputError, match="fold must be 0 or 1"):
        reconstruct_layerwise(model, [{**batch, "fold": torch.tensor([0, 1, 2, 0, 1, 1])}], plan)


def test_labels_do_not_reach_the_model_body():
    model = tiny("bert")
    batch = tiny_inputs(model, batch=4)
    labelled = calibrate(model, [{**batch, "labels": torch.arange(4)}])
    for name, moments in calibrate(model, [batch]).items():
        assert torch.equal(labelled[name].gram, moments.gram)


def test_probes_hold_inputs_alone():
    ids = torch.arange(3000).view(10, 300)
    probes = probe_batches([{"input_ids": ids, "labels": ids, "fold": torch.arange(10) % 2}])
    assert [set(probe) for probe in probes] == [{"input_ids"}]
    assert isinstance(next(read_batches(probes)), Batch)


def test_every_source_is_probed():
    ids = torch.arange(64 * 8).view(64, 8)
    batches = [
        {"input_ids": ids[at : at + 4], "source": torch.tensor([0, 1, 0, 1])}
        for at in range(0, 64, 4)
    ]
    rows = torch.cat([probe["input_ids"] for probe in probe_batches(batches)])[:, 0] // 8
    assert sorted((rows % 2).tolist()) == [0] * (len(rows) // 2) + [1] * (len(rows) // 2)
    alone = torch.cat([p["input_ids"] for p in probe_batches([{"input_ids": ids}])])
    assert len(alone) == len(rows)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 3), r"of shape \(2, 6\) as input_ids, got torch.float32 of shape \(2, 3\)"),
        (torch.ones(1, 6), "must be 1 for tokens that count"),
        (torch.ones(2), "must be 1 for tokens that count"),
        (torch.full((2, 6), torch.nan), "must be 1 for tokens that count"),
        (torch.full((2, 6), 5), "must be 1 for tokens that count"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, said):
    """One of ones, whatever its width, was once left out."""
    ids = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(InputError, match=said):
        list(read_batches([{"input_ids": ids, "attention_mask": mask}]))


IDS_OF_BART = torch.full((2, 8), 3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"labels": torch.full((2, 8), 1000)}, "has token 1000, and the tokens of Bart"),
        ({"decoder_input_ids": torch.full((2, 8), -1)}, "has token -1, and the tokens of Bart"),
        ({"decoder_input_ids": torch.full((2, 65), 3)}, "has 65 tokens in a sequence, and Bart"),
        ({"decoder_input_ids": torch.ones(2, 8)}, "must be int32 or int64 of shape"),
    ],
)
def test_what_a_decoder_reads_is_checked(more, said):
    with pytest.raises(InputError, match=f"batches: decoder_input_ids {said}"):
        calibrate(tiny("bart"), [{"input_ids": IDS_OF_BART, **more}])


TABLES = ["gpt2", "gptj", "codegen", "opt", "bert", "roberta", "mpnet", "siglip_text_model", "clip"]


@pytest.mark.parametrize("name", TABLES)
def test_sequences_longer_than_the_table_of_positions_are_refused(name):
    model = tiny(name)
    most = positions_of(model)
    calibrate(model, [tiny_inputs(model, tokens=most)])
    with pytest.raises(InputError, match=f"has {most + 1} tokens .*; give sequences of at most"):
        calibrate(model, [tiny_inputs(model, tokens=most + 1)])


@pytest.mark.parametrize("name", ["llama", "opt", "nomic_bert", "deberta-v2"])
def test_longer_sequences_are_read_without_a_table_or_beside_padding(name):
    """OPT doesn't count padding."""
    model = tiny(name)
    inputs = tiny_inputs(model, tokens=positions_of(model) + 1)
    inputs["attention_mask"][:, 0] = name != "opt"
    calibrate(model, [inputs])
