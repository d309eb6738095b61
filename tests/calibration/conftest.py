from __future__ import annotations

import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def _hub_answers(monkeypatch):
    """Datasets of these tests come from no hub."""
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda _: None)
