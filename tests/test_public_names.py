"""Importing the package is cheap, what it gives is documented, and old names keep working."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import liar_ext


def test_import_is_cheap():
    code = (
        "import torch, time; start = time.process_time(); import liar_ext, sys;"
        "spent = time.process_time() - start; "
        "print(spent, {'transformers', 'liar_ext.suggest'} & {*sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    # Timing is not asserted; what makes it slow is: transformers takes seconds to import.
    assert output[1:] == ["set()"]


def test_one_command_alone_imports_suggestions():
    """``liar families --suggest``, and `suggest_family` where it is asked for."""
    package = Path(liar_ext.__file__).parent
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parent.name != "suggest" and "liar_ext.suggest." in path.read_text("utf-8")
    ]
    assert sorted(found) == ["__init__.py", "cli/info.py"]
    code = (
        "import sys, liar_ext.cli; code = liar_ext.cli.main(['families']);"
        "sys.exit(code or 'liar_ext.suggest' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_public_names_are_documented():
    for name in liar_ext.__all__:
        assert getattr(liar_ext, name).__doc__, name
