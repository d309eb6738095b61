"""The tutorial and the pages for each consumer: their blocks run, and they have one shape."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil

import pages
import pytest
from test_docs import ROOT, parses

HOWTO = sorted((ROOT / "docs" / "howto").glob("*.md"))
TUTORIAL = ROOT / "docs" / "tutorial.md"
SHAPE = ["Requirements", "Commands", "Results", "Limits"]  # then, if need be, details
# Pages with blocks for an environment of its own, and the target that runs the whole page there.
ELSEWHERE = {"vllm": "check-vllm", "llmcompressor": "check-llmcompressor"}
by_name = {"ids": lambda page: page.stem}


@pytest.fixture(scope="session")
def beginning(tmp_path_factory):
    """What the pages begin with, written once."""
    folder = tmp_path_factory.mktemp("pages")
    pages.prepare(folder)
    return folder


@pytest.fixture
def here(beginning, tmp_path, monkeypatch):
    shutil.copytree(beginning, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", [TUTORIAL, *HOWTO], **by_name)
def test_the_blocks_of_the_page_run(page, here):
    languages = [block.language for block in pages.blocks(page)]
    read = {"yaml", "bash"}  # by test_project_files.py
    assert set(languages) <= {"python", "console", "py", *read}, "a block that nothing runs"
    assert "py" not in languages or page.stem in ELSEWHERE
    pages.run(page)
    assert page.stem in ELSEWHERE or len(languages) >= 3


@pytest.mark.parametrize("page", HOWTO, **by_name)
def test_the_pages_of_consumers_have_one_shape(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[: len(SHAPE)] == SHAPE
    assert re.match(r"# \S.*\n\n\S", text)
    assert "](../" in text, "no link to a page with the details"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_blocks_for_other_environments_are_run_by_their_target(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{ELSEWHERE[name]}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert f"tests/pages.py docs/howto/{name}.md" in recipe[1]
    page = ROOT / "docs" / "howto" / f"{name}.md"
    assert f"`make {ELSEWHERE[name]}`" in page.read_text(encoding="utf-8")
    trees = [ast.parse(block.text) for block in pages.blocks(page) if block.language == "py"]
    assert trees
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("liar_ext"):
            source = importlib.util.find_spec(node.module).origin
            with open(source, encoding="utf-8") as file:
                defined = {getattr(each, "name", "") for each in ast.parse(file.read()).body}
            assert {each.name for each in node.names} <= defined


def test_commands_parse_and_options_exist():
    found = 0
    for page in [TUTORIAL, *HOWTO]:
        for block in pages.blocks(page):
            if block.language == "console":
                for command, _ in pages.commands(block.text):
                    parses(command)
                    found += 1
    assert found > 15


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_block_that_fails_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError) as seen:
        pages.run(write(tmp_path / "a.md", "# A\n\n```python\nx = 1\n1 / 0\n```\n"))
    assert seen.traceback[-1].lineno + 1 == 5  # the line of the page
    with pytest.raises(AssertionError, match="exit code 2"):
        pages.run(write(tmp_path / "b.md", "```console\n$ liar verify nowhere\n```\n"))
    with pytest.raises(AssertionError, match="begins with a command"):
        pages.run(write(tmp_path / "c.md", "```console\nliar doctor\n```\n"))
    with pytest.raises(AssertionError, match="no line like 'torch 1.2 or so'"):
        pages.run(write(tmp_path / "d.md", "```console\n$ liar doctor\ntorch 1.2 or so\n```\n"))
    pages.run(write(tmp_path / "e.md", "```py\n1 / 0\n```\n"))
    with pytest.raises(ZeroDivisionError):
        pages.run(tmp_path / "e.md", ("py",))


def test_printed_lines_are_compared_but_for_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = f"a   1,234 → 5.6e-07 (70.1%)\n{tmp_path}/x.gguf: 0.5 MB\nend -3\n"
    pages.check_printed("c", ["a 9 → 8 (1%)", "...", "/home/me/x.gguf: 12 GB"], printed)
    for shown in (["end 1", "a 9 → 8 (1%)"], ["b 9 → 8 (1%)"], ["end -3", "end -3"], ["end3"]):
        with pytest.raises(AssertionError, match="no line like"):
            pages.check_printed("c", shown, printed)
