"""The house: imports go down the floors only, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import liar_ext

FLOORS = {
    0: "errors knapsack reference wiring",
    1: "dispatch streams plan",
    2: "ops families",
    3: "arch hidden moments outputs report solution",
    4: "stock probe texts calibration gradients curves sensitivity allocation ridge towards blocks "
    "norms surgery evaluation",
    5: "criteria reconstruction walk narrowing saving",
    6: "losses checkpoint options layerwise",
    7: "pipeline",
    8: "cli",
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
PACKAGE = Path(liar_ext.__file__).parent


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "liar_ext":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("liar_ext."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("liar_ext.")}
    return rooms


def test_imports_go_down_only():
    files = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert {path.stem for path in files} == set(FLOOR_OF), "every room stands on a floor"
    for path in files:
        for room in imported_rooms(path) - {"_C"}:
            assert FLOOR_OF[room] < FLOOR_OF[path.stem], f"{path.stem} imports {room}"


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
