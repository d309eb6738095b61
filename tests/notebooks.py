"""Runs the code cells of a notebook, in order, in one namespace; writes what they print into it.

``LIAR_MODEL=... LIAR_TEXT=... python tests/notebooks.py NOTEBOOK`` replaces the outputs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path


def run(notebook: dict, name: str = "notebook") -> None:
    """Run the code cells in the current folder; their outputs become what each printed."""
    names: dict[str, object] = {"__name__": "notebook"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
        lines = printed.getvalue().splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": lines}
        cell |= {"execution_count": number, "outputs": [stream] if lines else []}


def main(path: str) -> None:
    """Run a notebook in a temporary folder and write its outputs."""
    file = Path(path).resolve()
    notebook = json.loads(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run(notebook, file.name)
    written = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    file.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
