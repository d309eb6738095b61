"""The docs: links, commands, names and code blocks are true, and the words are the field's."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import liar_ext
from liar_ext.cli.main import parser
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.models.registry import FAMILIES
from liar_ext.selection.criteria import _CRITERIA

ROOT = Path(__file__).parent.parent
PACKAGE = Path(liar_ext.__file__).parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(PACKAGE.rglob("*.py"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
PATHS = r"(?<![\w./-])((?:liar_ext|csrc|tests|bench|docs|demo|\.ci)/[\w./*{},-]*[\w*/}])"
# What stands for a number in a command line of the docs.
PLACEHOLDERS = {"SIZE": "4GiB", "F": "0.9", "N": "4", "LAMBDA": "0.01", "FORMAT": "gguf", "...": ""}
# Words of our own, for which the field has a term.
SLANG = {
    r"who goes": "importance score, which units are pruned",
    r"(what (is|was)|nothing) put back|is put back": "reconstruction, error compensation",
    r"how many (go|of each kind|where)\b": "how the pruning ratio is distributed over the sites",
    r"\brooms\b": "modules",
    r"\bfloors\b|\*\*Floor": "layers of imports; lower bound",
    r"the model feels": "sensitivity",
    r"(?-i:\bMETHOD\b)": "docs/method.md, section ...",
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def without_code(text: str) -> str:
    """Return Markdown without its fenced and indented blocks."""
    return re.sub(r"^(?: {4}|\t).*$", "", FENCE.sub("", text), flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def docstrings(path: Path) -> list[tuple[str, str]]:
    """Return name and text of every docstring of a module."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(getattr(node, "name", path.stem), node) for node in nodes if isinstance(node, kinds)]
    return [(name, text) for name, node in found if (text := ast.get_docstring(node))]


@pages
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_a_broken_anchor_would_be_seen():
    assert anchors("# A `b`: c, λ\n```\n# no\n```\n## d e\n## d e") == {"a-b-c-λ", "d-e", "d-e-1"}


@pages
def test_files_that_are_named_exist(page):
    """Also in commands and trees; ``*`` may stand for several, ``{a,b}`` for either."""
    for name in re.findall(PATHS, page.read_text(encoding="utf-8")):
        parts = re.match(r"(.*?)\{(.*?)\}(.*)", name)
        options = [parts[1] + each + parts[3] for each in parts[2].split(",")] if parts else [name]
        for option in options:
            assert list(ROOT.glob(option.rstrip("/"))), f"{page.name}: {option}"


def test_every_folder_is_in_the_tree_of_contributing():
    tree = set(
        re.findall(r"^    ((?:liar_ext|csrc)/\S*?)/? ", CONTRIBUTING.read_text("utf-8"), re.M)
    )
    for top, suffix in (("liar_ext", ".py"), ("csrc", ".c*")):
        folders = {path.parent for path in (ROOT / top).rglob(f"*{suffix}")} - {ROOT / top}
        folders = {folder for folder in folders if folder.name != "__pycache__"}
        assert len(folders) > 3
        assert {folder.relative_to(ROOT).as_posix() for folder in folders} <= tree


def commands(text: str) -> list[str]:
    """Return the command lines of ``liar`` in a page, of blocks and of running text."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^(?: {4}|\$ )(liar .*)$", joined, re.MULTILINE)
    fenced = [line for block in FENCE.findall(joined) for line in block[2].splitlines()]
    blocks += [line.strip().removeprefix("$ ") for line in fenced]
    inline = re.findall(r"`(liar [^`]*)`", without_code(joined))
    return [line for line in dict.fromkeys(blocks + inline) if line.startswith("liar ")]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the subcommands by name."""
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def parses(line: str) -> None:
    """Raise AssertionError unless the parser of the command takes a command line of the docs."""
    line = re.sub(r"\[([^\]]*)\]", r"\1", line.split("#")[0])  # optional parts count
    name, *words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)[1:]]
    known = subcommands()
    if name in ("COMMAND", "--version"):
        name = "doctor"
    assert name in known, f"no subcommand {name}: {line}"
    words = [word for word in words if word]
    if not any(not word.startswith("-") for word in words):
        # A command and some of its options, named in running text.
        options = known[name]._option_string_actions
        assert all(word in options for word in words), line
        return
    problems = io.StringIO()
    with contextlib.redirect_stderr(problems), contextlib.redirect_stdout(io.StringIO()):
        try:
            known[name].parse_args(words)
        except SystemExit as end:
            assert end.code == 0, f"{line}: {problems.getvalue().splitlines()[-1]}"


@pages
def test_command_lines_parse(page):
    for line in commands(page.read_text(encoding="utf-8")):
        parses(line)


def test_a_wrong_command_line_would_be_seen():
    assert commands("a\n\n    liar prune M --out x\n\n`liar eval`") == [
        "liar prune M --out x",
        "liar eval",
    ]
    for line in ("liar prune M --kep 0.8", "liar shrink M", "liar verify --jsn", "liar bench M"):
        with pytest.raises(AssertionError):
            parses(line)
    parses("liar COMMAND --help")
    parses("liar prune MODEL --calibration TEXT --out DIR [--memory SIZE]")


@pages
def test_options_that_are_named_exist(page):
    """In running text: of the command, or of a script of bench/, csrc/ or pytest."""
    known = {word for each in subcommands().values() for word in each._option_string_actions}
    for script in [*(ROOT / "bench").rglob("*.py"), *(ROOT / "csrc").rglob("*.py")]:
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    for code in re.findall(r"`([^`\n]+)`", without_code(page.read_text(encoding="utf-8"))):
        if code.startswith("--"):
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
                assert option in known, f"{page.name}: {option}"


def names_of_the_code() -> set[str]:
    """Return what the package defines, members as ``Class.member``, and its strings in quotes."""
    names = {"math.inf"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
                fields += [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                names |= {node.name} | {f"{node.name}.{field}" for field in fields}
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(f'"{node.value}"')
    return names


def test_names_of_the_glossary_exist():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == 6 for row in rows)
    used = [name for row in rows for name in re.findall(r"`([^`]+)`", row[4])]
    known = names_of_the_code()
    assert len(used) > 40
    assert not [name for name in used if name not in known]


def test_names_of_the_method_exist():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    lines = re.findall(r"^Code: (.*?)\n\n", text + "\n\n", re.MULTILINE | re.DOTALL)
    known = names_of_the_code() | {f"liar_ext.{name}" for name in liar_ext.__all__}
    known |= {f"liar_ext.ops.{name}" for name in liar_ext.ops.__all__}
    assert len(lines) > 8
    assert not [name for line in lines for name in re.findall("`(.*?)`", line) if name not in known]


def test_every_criterion_and_family_has_its_line():
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert not [name for name in _CRITERIA if f"\n| `{name}` |" not in method]
    table = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").split("## Each family")[1]
    assert re.findall(r"^\| ([\w-]+) \|", table, re.MULTILINE)[1:] == sorted(FAMILIES)


def test_sections_that_are_cited_exist():
    """In docstrings: ``docs/method.md, section "..."``."""
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/method.md").read_text("utf-8"), re.MULTILINE)
    cited = []
    for path in SOURCES:
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        cited += re.findall(r'docs/method\.md, section "([^"]*)"', text)
    assert set(cited) <= set(headings), set(cited) - set(headings)


@pytest.fixture
def tables():
    """Registries as they were, whatever a page registers."""
    tables = _CRITERIA, CRITERIA, FAMILIES
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_code_of_extend_runs(tables):
    page = ROOT / "docs" / "extend.md"
    text = page.read_text(encoding="utf-8")
    blocks = [block for block in FENCE.finditer(text) if block[2] == "python"]
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        lines = "\n" * text.count("\n", 0, block.start(3)) + textwrap.dedent(block[3])
        exec(compile(lines, str(page), "exec"), names)


@pages
def test_imports_of_python_blocks_exist(page):
    for _, language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            tree = ast.parse(textwrap.dedent(code))
            kinds = (ast.Import, ast.ImportFrom)
            imports = [node for node in tree.body if isinstance(node, kinds)]
            exec(compile(ast.Module(imports, []), str(page), "exec"), {})
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "liar_ext":
                    assert hasattr(liar_ext, node.attr), f"{page.name}: liar_ext.{node.attr}"


def slang(text: str) -> list[str]:
    """Return what of a text is in words of our own, with the field's."""
    text = re.sub(r"\s+", " ", text)
    hits = []
    for word, instead in SLANG.items():
        found = re.finditer(rf".{{0,40}}(?:{word}).{{0,20}}", text, re.IGNORECASE)
        hits += [f"...{hit[0]}...: {instead}" for hit in found]
    return hits


@pages
def test_words_are_those_of_the_field(page):
    assert not slang(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", subcommands())
def test_words_of_help_are_those_of_the_field(name):
    assert not slang(subcommands()[name].format_help())


def test_words_of_docstrings_are_those_of_the_field():
    paths = [*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "demo").glob("*.py")]
    texts = [(path, name, text) for path in paths for name, text in docstrings(path)]
    assert len(texts) > 200
    found = [(path.name, name, hit) for path, name, text in texts for hit in slang(text)]
    assert not found, found
    assert slang("Who goes,\nand what is put back") and not slang("The method of rooms_for_sums.")


def test_cross_references_of_docstrings_resolve():
    """``:func:`` and its kind, with or without the package's name in front."""
    seen = 0
    for path in SOURCES:
        for name, text in docstrings(path):
            for target in re.findall(r":(?:func|class|mod|attr|meth):`~?(liar_ext[\w.]*)`", text):
                assert resolves(target), f"{path.name}, {name}: {target}"
                seen += 1
    assert seen > 20


def resolves(target: str) -> bool:
    """Tell whether a dotted name is a module, or something in one; fields of dataclasses count."""
    parts = target.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            fields = getattr(value, "__dataclass_fields__", {})
            if part not in fields and not hasattr(value, part):
                return False
            value = getattr(value, part, None)
        return True
    return False


@pytest.mark.parametrize("name", ["README.md", "docs/matrix.md"])
def test_the_matrix_has_every_consumer_and_no_failure(name):
    script = (ROOT / "bench" / "matrix" / "page.py").read_text(encoding="utf-8")
    consumers = ast.literal_eval(re.search(r"^CONSUMERS = (\(.*?^\))", script, re.M | re.S)[1])
    page = (ROOT / name).read_text(encoding="utf-8")
    table = page.partition("<!-- matrix: begin -->")[2].partition("<!-- matrix: end -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for consumer in consumers:
        of = [row for row in rows if row.startswith(f"| {consumer} |")]
        assert len(of) == (1 if name == "README.md" else 3), consumer
        assert not [row for row in of if "**" in row or "not run" in row], consumer
