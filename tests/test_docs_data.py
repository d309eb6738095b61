"""Numbers of the README, pictures and folded tables are those of docs/data."""

from __future__ import annotations

import json
import re

import pytest
from test_docs import PAGES, ROOT

from bench.figures import DATA, PICTURES, PLOTS, digest, placed

FILES = sorted(DATA.glob("*.json"))
NUMBER = re.compile(r"(?<![\w.,+/@-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w/])")
# Versions, and the paper.
NO_RESULTS = {"3.10", "2407.13331"}


def numbers(text: str) -> set[str]:
    """Return the numbers of a page that are results: none of commands, names, links or marks."""
    text = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```(?:bash|python)\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|(?<!`)`[^`\n]+`", "", text)
    return set(NUMBER.findall(text)) - NO_RESULTS


def kept() -> set[str]:
    """Return the numbers of all files."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in FILES]
    cells = [cell for file in files for row in file["rows"] for cell in row]
    cells += [column for file in files for column in file["columns"]]
    cells += [file["note"] for file in files]
    return set(NUMBER.findall(re.sub(r"[×%]", " ", "\n".join(cells))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_data_name_their_command(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["command"].split()[0] in ("make", "python", "liar", "an")
    assert data["rows"] and {len(row) for row in data["rows"]} == {len(data["columns"])}


def test_numbers_of_the_readme_are_in_the_data():
    found = numbers((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) > 20
    assert not found - kept()


def test_a_number_that_no_command_wrote_would_be_seen():
    page = (
        "a 12.3 % of 1,234 [4](x5) `6` all-7B 8k\n```bash\n9\n```\n```\n10 → 11\n```\nPython 3.10"
    )
    assert numbers(page) == {"12.3", "1,234", "4", "10", "11"}
    assert "0.8691" not in kept()


@pytest.mark.parametrize("draw", PICTURES, ids=lambda draw: draw.__name__)
def test_pictures_are_of_the_data_as_they_are(draw):
    """`make figures` draws them."""
    picture = (PLOTS / f"{draw.__name__}.svg").read_text(encoding="utf-8")
    assert digest(PICTURES[draw][0]) in picture


def test_every_picture_is_drawn_and_shown():
    assert {path.stem for path in PLOTS.iterdir()} == {draw.__name__ for draw in PICTURES}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path.name for path in PLOTS.iterdir() if f"plots/{path.name}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_those_of_the_data(page):
    """`make figures` writes them."""
    text = page.read_text(encoding="utf-8")
    assert placed(text) == text
