"""The calibration sets of `python -m bench.quality`."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny

from bench.quality.texts import Texts
from liar_ext.calibration.documents import Documents
from liar_ext.calibration.generated import SELF

DRAWN = {"samples": 8, "seq_len": 12, "seed": 0, "lone": "halves", "random_tokens": "auto"}


@pytest.mark.parametrize("self_text", [0.0, 0.25])
def test_each_model_writes_its_own_text_once(self_text, tokenizer):
    texts = Texts({SELF: SELF}, {})
    if self_text:
        texts.calibration = {"text": Documents(["ab" * 300] * 9)}
    first, second = tiny("llama"), tiny("llama", seed=1)
    drawn = [
        texts.draw(model, tokenizer, self_text=self_text, **DRAWN).input_ids
        for model in (first, second, first)
    ]
    assert len(drawn[0]) == (11 if self_text else 8)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
