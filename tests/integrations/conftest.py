from __future__ import annotations

import pytest
from compressing import SIZES
from tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny dense Llama whose sizes have groups of 32."""
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama", **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
