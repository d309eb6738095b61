"""Importing the package is cheap, what it gives is documented, and old names keep working."""

from __future__ import annotations

import subprocess
import sys

import liar_ext


def test_import_is_cheap():
    code = (
        "import torch, time; start = time.process_time(); import liar_ext, sys;"
        "spent = time.process_time() - start; "
        "print(spent, 'transformers' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    # Timing is not asserted; what makes it slow is: transformers takes seconds to import.
    assert output[1] == "False"


def test_public_names_are_documented():
    for name in liar_ext.__all__:
        assert getattr(liar_ext, name).__doc__, name
