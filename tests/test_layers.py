"""The layers of imports, as CONTRIBUTING shows them, and the size of modules and functions.

The table stands in CONTRIBUTING.md alone and is read from there: a number and the modules and
folders of ``liar_ext`` on that layer. Whatever stands on a layer imports from lower ones only;
modules of one folder may import one another, in no circle.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from liar_ext import _MODULES, InputError  # where each public name is

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "liar_ext"
NO_LAYER = {"__init__", "__main__"}  # the public names, and nothing else
MOST_LINES, MOST_IN_FUNCTION = 400, 80


def layers(text: str) -> dict[str, int]:
    """Return the layer of each module or folder, from the table of CONTRIBUTING."""
    rows = re.findall(r"^    (\d+)  (\S.*)$", text, re.M)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"\w+", names)}


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def home(path: Path, package: Path) -> str:
    """Return the folder of a module below the package, or the module if it lies in none."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Yield the folder, or top module, of whatever a module imports from the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            if node.module == "liar_ext":
                homes = {name: where.split(".")[0] for name, where in _MODULES.items()}
                yield from (homes.get(alias.name, alias.name) for alias in node.names)
            elif (node.module or "").startswith("liar_ext."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.split(".")[1] for name in names if name.startswith("liar_ext."))


def violations(package: Path, layer_of: dict[str, int]) -> list[str]:
    """Return every import that doesn't go down, and every module without a layer."""
    found = []
    for path in modules(package):
        own = home(path, package)
        if own in NO_LAYER:
            continue
        if own not in layer_of:
            found.append(f"{own} stands on no layer")
            continue
        for name in imported(path):
            if name != own and layer_of.get(name, 99) >= layer_of[own]:
                found.append(f"{path.relative_to(package)} imports {name}")
    return found


def too_long(package: Path) -> list[str]:
    """Return the modules and functions over their limits."""
    found = []
    for path in modules(package):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES:
            found.append(f"{path.relative_to(package)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                if length > MOST_IN_FUNCTION:
                    found.append(f"{path.relative_to(package)}: {node.name}, {length} lines")
    return found


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return 0
    return first.end_lineno - first.lineno + 1


def table() -> dict[str, int]:
    return layers((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_imports_go_down_only():
    assert violations(PACKAGE, table()) == []


def circles(package: Path) -> list[str]:
    """Return the modules that import one another in circles; functions and types count, too."""
    paths = [path for path in modules(package) if path.stem not in NO_LAYER]
    names = [path.relative_to(package.parent).with_suffix("").parts for path in paths]
    needs = {".".join(parts): set() for parts in names}
    for name, path in zip(list(needs), paths, strict=True):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                needs[name] |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
            elif isinstance(node, ast.Import):
                needs[name] |= {each.name for each in node.names}
    while free := [name for name, others in needs.items() if not others & needs.keys()]:
        needs = {name: others for name, others in needs.items() if name not in free}
    return sorted(needs)


def test_no_modules_import_one_another_in_a_circle():
    assert circles(PACKAGE) == []


def test_the_table_names_what_there_is():
    there = {home(path, PACKAGE) for path in modules(PACKAGE)} | {"_C"}
    assert set(table()) == there - NO_LAYER


def test_modules_and_functions_fit():
    assert too_long(PACKAGE) == []


@pytest.fixture
def small(tmp_path):
    """A package of two folders; the higher one imports from the lower one."""
    for folder in ("high", "low"):
        (tmp_path / folder).mkdir()
    (tmp_path / "high" / "a.py").write_text("from liar_ext.low.b import x\n")
    (tmp_path / "low" / "b.py").write_text("x = 1\n")
    return tmp_path


def test_no_two_test_files_share_a_name():
    """In folders that are no packages pytest imports each by its name alone; one of two fails."""
    found = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not {name for name, times in found.items() if times > 1}


def test_an_import_that_goes_up_is_found(small):
    layer_of = {"high": 2, "low": 1}
    assert violations(small, layer_of) == []
    (small / "low" / "b.py").write_text("def f():\n    from liar_ext.high import a\n")
    assert violations(small, layer_of) == ["low/b.py imports high"]
    (small / "low" / "b.py").write_text("from liar_ext import high\n")
    assert violations(small, layer_of) == ["low/b.py imports high"]
    (small / "low" / "deeper").mkdir()
    (small / "low" / "deeper" / "c.py").write_text("import liar_ext.high.a\n")
    assert "low/deeper/c.py imports high" in violations(small, layer_of)


def test_what_is_too_long_is_found(small):
    assert too_long(small) == []
    (small / "low" / "b.py").write_text("x = 1\n" * 401)
    (small / "high" / "a.py").write_text("def f():\n" + "    x = 1\n" * 81)
    assert too_long(small) == ["high/a.py: f, 82 lines", "low/b.py: 401 lines"]


@pytest.mark.parametrize("folder", ["bench", "csrc", "demo", "tests"])
def test_names_that_other_code_takes_are_there(folder):
    """Much of it runs by hand, or where there is a GPU or Triton."""
    for path in modules(ROOT / folder):
        if "assets" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for script, name in re.findall(r'script\("([\w/.]+)"\)\.(\w+)', text):
            tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
            assert name in {getattr(node, "name", "") for node in tree.body}, f"{path}: {script}"
        assert lacking(text) == [], path


def lacking(text: str) -> list[str]:
    """Return the names that code takes from modules of liar_ext, and that those don't have."""
    nodes, modules, taken = list(ast.walk(ast.parse(text))), {}, []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("liar_ext"):
            taken += [(node.module, each.name) for each in node.names]
            modules |= {
                each.asname or each.name: f"{node.module}.{each.name}" for each in node.names
            }
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module and (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py").exists():
                taken.append((module, node.attr))
    return [f"{module}.{name}" for module, name in taken if not defines(module, name)]


def defines(module: str, name: str) -> bool:
    """Tell whether a module has a name; also if a package that it needs is not installed."""
    try:
        found = importlib.import_module(module)
    except InputError:
        return True
    except ModuleNotFoundError as error:
        return not (error.name or "").startswith("liar_ext")
    inside = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
    return hasattr(found, name) or bool(inside)


def test_a_circle_is_found(small):
    high, low = (f"{small.name}.{name}" for name in ("high.a", "low.b"))
    (small / "high" / "a.py").write_text(f"from {low} import x\n")
    assert circles(small) == []
    (small / "low" / "b.py").write_text(f"x = 1\ndef f():\n    from {small.name}.high import a\n")
    assert circles(small) == [high, low]


def test_a_name_that_is_not_there_is_found():
    code = "from liar_ext.ops import backends\nbackends.Backend\n"
    assert lacking(code) == []
    assert lacking(code + "backends.Front") == ["liar_ext.ops.backends.Front"]
    assert lacking("from liar_ext.ops import front") == ["liar_ext.ops.front"]
