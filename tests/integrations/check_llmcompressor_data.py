"""Modifiers in llm-compressor itself: which tokens of ``oneshot``'s data count."""

from __future__ import annotations

import pytest
import torch
from compressing import EQUAL, load, loader, padded, rows, run
from datasets import Dataset

from liar_ext import InputError
from liar_ext.integrations.llmcompressor import LIARPruningModifier, calibration_batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(folder, side):
    short = [
        {name: value[: 10 + i] for name, value in row.items()} for i, row in enumerate(rows(8))
    ]
    long = [padded(row, 24, side) for row in short]
    reports = []
    for some, batch in ((short, 1), (long, 4)):
        modifier = LIARPruningModifier(**EQUAL, allocation="uniform")
        run(folder, modifier, dataset=loader(some, batch))
        reports.append(modifier.report)
    (one, other) = reports
    assert one.settings["calibration_tokens"] == other.settings["calibration_tokens"]
    assert one.plan == other.plan
    for a, b in zip(one.sites, other.sites, strict=True):
        assert a.holdout_error == pytest.approx(b.holdout_error, rel=1e-3)


def test_a_row_of_padding_alone_counts_for_nothing_and_a_batch_is_refused(folder):
    some = rows(8)
    empty = {"input_ids": torch.zeros(24, dtype=torch.long)}
    empty["attention_mask"] = torch.zeros_like(empty["input_ids"])
    modifier = LIARPruningModifier(**EQUAL)
    run(folder, modifier, dataset=loader([*some[:3], empty, *some[3:]], 3))
    assert modifier.report.settings["calibration_tokens"] == 8 * 24
    assert all(row.dropped_rows == 0 for row in modifier.report.sites)
    with pytest.raises(InputError, match="holds only padding"):
        run(folder, LIARPruningModifier(**EQUAL), dataset=loader([*some, empty], 1))


def test_loss_masks_leave_tokens_out(folder):
    some = [{**row, "loss_mask": torch.arange(24) >= 8} for row in rows(8)]
    batches = list(calibration_batches(load(folder), loader(some)))
    assert all(int(batch.mask.sum()) == 4 * 16 for batch in batches)
    assert all("loss_mask" not in batch.inputs for batch in batches)
    weighed = [{**row, "weight": torch.tensor(2.0)} for row in some]
    batches = calibration_batches(load(folder), loader(weighed))
    assert all(batch.weight.tolist() == [2.0] * 4 for batch in batches)
    modifier = LIARPruningModifier(**EQUAL)
    run(folder, modifier, dataset=loader(some), use_loss_mask=True)
    assert modifier.report.settings["calibration_tokens"] == 8 * 16


def test_a_text_dataset_is_tokenised_by_oneshot(folder):
    words = "structured pruning removes whole heads and channels of a model "
    texts = [words[i:] + words[:i] for i in range(16)]
    modifier = LIARPruningModifier(**EQUAL)
    run(folder, modifier, dataset=Dataset.from_dict({"text": texts}), max_seq_length=32)
    assert modifier.report.settings["calibration_sequences"] == 16
