"""The documentation site: every page is in its navigation, and the API pages have every name."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from test_docs import ROOT, resolves

import liar_ext
import liar_ext.checkpoint
import liar_ext.export
from liar_ext.export import FORMATS

DOCS = ROOT / "docs"
API = {page.stem: page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")}
DIRECTIVES = [name for text in API.values() for name in re.findall(r"^::: (\S+)$", text, re.M)]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose slugs are made by a function."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def settings() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)  # noqa: S506


def entries(nav) -> list[str]:
    """Return the pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in entries(part)]


def test_every_page_is_in_the_navigation_once():
    listed = entries(settings()["nav"])
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(there)
    assert listed[0] == "index.md"


def test_warnings_of_the_site_are_errors():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    assert "mkdocs build --strict" in recipe
    checks = settings()["validation"]
    assert {*checks.pop("nav").values()} == {*checks.values()} == {"warn"}
    assert {"omitted_files", "absolute_links", "unrecognized_links", "anchors"} == {*checks}


@pytest.mark.parametrize("name", DIRECTIVES)
def test_names_of_the_api_pages_exist(name):
    if name.startswith("liar_ext.integrations."):  # imported where its program is
        assert importlib.util.find_spec(name)
    else:
        assert resolves(name)


def test_every_public_name_has_its_place():
    names = {f"liar_ext.{name}" for name in liar_ext.__all__ if name != "__version__"}
    names |= {f"liar_ext.export.{name}" for name in liar_ext.export.__all__}
    names |= {f"{row.module}.export" for row in FORMATS.values()}
    folder = ROOT / "liar_ext" / "integrations"
    modules = {f"liar_ext.integrations.{path.stem}" for path in folder.glob("[a-z]*.py")}
    names |= modules - {"liar_ext.integrations.linear_grams"}
    assert names - set(DIRECTIVES) == set()
    assert len(DIRECTIVES) == len(set(DIRECTIVES))


def test_lists_are_lists_in_both_readers():
    """GitHub takes a list right below a paragraph, and two blanks; Python-Markdown neither."""
    for page in DOCS.rglob("*.md"):
        text = re.sub(r"^( *)```.*?^ *```$", "", page.read_text("utf-8"), flags=re.M | re.S)
        lines = text.splitlines()
        for above, line in zip(["", *lines], lines, strict=False):
            item = re.match(r" *([-*]|\d+\.) \S", line)
            if item and above.strip() and item[1] in ("-", "*", "1."):
                continues = re.match(r" *(?:[-*]|\d+\.) \S| {2,}\S", above)
                assert continues, f"{page.name}: no blank line above {line!r}"
            if item or not above.strip():
                blanks = len(line) - len(line.lstrip())
                assert blanks % 4 == 0, f"{page.name}: {blanks} blanks: {line!r}"


def test_the_extra_of_the_site_has_what_it_is_configured_with():
    written = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.search(r"^docs = \[(.*)\]$", written, re.MULTILINE)[1]
    for name in ("mkdocs-material", "mkdocstrings[python]", "ruff"):  # ruff breaks signatures
        assert name in wanted
    assert settings()["theme"]["name"] == "material"


def imported(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_search_needs_no_server_and_no_network():
    """The offline plugin takes a script from elsewhere unless it finds one of this name."""
    found = settings()
    assert "offline" in found["plugins"] and found["use_directory_urls"] is False
    (script,) = found["extra"]["polyfills"]
    assert "iframe-worker" in script and (DOCS / script).is_file()


def test_cells_of_prose_name_their_columns():
    head = "<table>\n<thead><tr><th>a</th><th>b <code>&lt;</code></th><th>c</th></tr></thead>"
    row = '<tr><td>1</td><td style="x">2</td><td>{}</td></tr>'
    table = head + 2 * row.format("word " * 20) + "</table>"
    found = imported("tables").on_page_content(f"<p>x</p>{table}", page=None)
    assert found.count("<table data-prose>") == 1 and found.count('data-head="c"') == 2
    assert '<td data-head="b &lt;" style="x">2</td>' in found
    short = head + row.format("3") + "</table>"
    assert imported("tables").on_page_content(short) == short


def test_docstrings_are_rewritten_for_the_site(monkeypatch):
    # The site's environment has griffe, that of the tests has not.
    stub = SimpleNamespace(Extension=object, Object=object, Attribute=object)
    monkeypatch.setitem(sys.modules, "griffe", stub)
    text = imported("roles").as_markdown(
        "See :func:`~liar_ext.prune`, :class:`Plan`::\n\n    x = 1\n\na::b"
    )
    assert text == (
        'See <autoref identifier="liar_ext.prune" optional><code>prune</code></autoref>, '
        '<autoref identifier="Plan" optional><code>Plan</code></autoref>:\n\n    x = 1\n\na::b'
    )
