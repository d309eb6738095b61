"""What the tests of commands share."""

from __future__ import annotations

import pytest

from liar_ext.system.progress import no_bars


@pytest.fixture(autouse=True)
def without_bars_of_loading():
    """Keep back the bars of transformers, so that what a command itself says stands alone."""
    with no_bars():
        yield
