from __future__ import annotations

import pytest


@pytest.fixture
def unchanged():
    """Begin and end with the kernels' own settings."""
    from host_kernels import kernels

    kernels().configure()
    yield
    kernels().configure()
