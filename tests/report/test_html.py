"""The page of a report: what it says, and what a stranger's report can't make it do."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from covers import some
from example_reports import (
    NASTY,
    SCRIPT,
    bench_of,
    hostile,
    ordinary,
    save,
    site,
    store_bench,
    write_pages,
)
from example_reports import wrong as wrong_kinds
from test_report import GRID, LATENCY

from liar_ext import InputError
from liar_ext.checkpoint.folder import REPORT_JSON, strangers, write_manifest
from liar_ext.cli import main
from liar_ext.cli.main import parser
from liar_ext.report import pictures
from liar_ext.report.page import MARK, commands, write_page
from liar_ext.report.report import MOST_SITES, Report
from liar_ext.system import files

TAGS = set("html head meta title style body main h1 h2 p b div span i section figure".split())
TAGS |= set("figcaption table thead tbody tr th td details summary footer code".split())
TAGS |= set("ol li pre a svg g path defs use text clippath rect title".split())


class Reader(HTMLParser):
    """What a browser would make of a page: its tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.said, self.code = set(), [], [], []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *each) for each in attributes]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *each) for each in attributes]

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said.append(data)
        if self.open and self.open[-1] == "code":
            self.code.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.said))


def written(tmp_path: Path, fields, name: str = "run", **settings) -> Reader:
    """Return the page of a report, read; it is sound HTML of nothing but the tags above."""
    folder = save(tmp_path / name, fields)
    page, *_ = write_page(folder, **settings)
    text = page.read_text(encoding="utf-8")
    found = Reader(text)
    assert found.open == [] and found.tags <= TAGS, found.tags - TAGS
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#") or (tag, name) == ("a", "href"), value
            assert tag != "a" or value.endswith("liar/report.json") and ":" not in value, value
    assert not re.search(r"@import|url\((?!#)", text)
    return found


def test_the_page_says_what_the_report_does(tmp_path):
    page = written(tmp_path, ordinary())
    said = page.text
    for told in (
        "134.5\u00a0M → 113.3\u00a0M",
        "84.2%",
        "27.53",
        "37.91",
        "×\u00a01.377",
        "538.1\u00a0MB",
    ):
        assert told.replace("\u00a0", " ") in said.replace("\u00a0", " ")
    assert "an/ordinary-135M" in said and "4,088 tokens in windows of 512" in said
    assert "Few tokens." in said and "3.7 min" in said and "0.31" in said
    assert "15.mlp" in said and "Sites (60)" in said
    assert "calibration" in said and "held out" in said and "allocate" in said
    assert "liar_ext.load_pruned(folder)" in page.code and page.text.count("`") == 0
    assert "16% smaller, perplexity 38% higher, 1 warning." in said
    assert "24% of the attention heads and 23% of the MLP channels" in said
    assert "MLP of layer 15 keeps 1,044 of 1,536 units" in said and "read the 1 warning" in said
    assert ("a", "href", "run/liar/report.json") in page.attributes


def test_the_page_says_what_to_type_next(tmp_path):
    """What a stranger's report names is quoted, for a shell and for Python."""
    folder, model = tmp_path / "it's $(ls)", "m; `ls`"
    load = "It loads with `transformers.AutoModelForCausalLM.from_pretrained(folder{})`."
    report = Report(model, loading=load.format(", trust_remote_code=True"))
    (_, loads), (_, judges), (_, times) = commands(folder, report, False)
    call = ast.parse(loads, mode="eval").body
    assert ast.unparse(call.func) == "transformers.AutoModelForCausalLM.from_pretrained"
    assert call.args[0].value == str(folder) and call.keywords[0].arg == "trust_remote_code"
    assert shlex.split(judges) == ["liar", "eval", str(folder), "--text", "held_out.jsonl"]
    assert shlex.split(times) == ["liar", "bench", str(folder), "--against", model]
    report = Report(model, loading=load.format(", x=y"), evaluation={"certified": {}})
    (_, loads), (_, checks), (_, exports) = commands("p", report, True)
    assert (loads, checks) == ("liar_ext.load_pruned('p')", "liar verify p")
    found = commands("-p", Report("-m", loading=load), False)
    (_, _), (_, dashed), (_, both) = found
    (*_, replaced) = commands("p", Report("./p", loading=load), False)
    assert replaced[1] == "liar bench p --against MODEL"  # not itself
    for line in (judges, checks, times, exports, dashed, both):
        parser().parse_args(shlex.split(line)[1:])


def test_earlier_jobs_are_told_of(tmp_path):
    job = {"budget": {"keep": 0.9}, "params": [2000, 1800]}
    said = written(tmp_path, ordinary(2, earlier=[job])).text
    assert "Pruned before" in said and "2,000 → 1,800 parameters (keep 0.9)" in said
    for jobs in ([], [job, None], [{"params": NASTY}]):
        assert "Pruned before" not in written(tmp_path, ordinary(2, earlier=jobs)).text


def test_pictures_are_text_and_follow_light_and_dark(tmp_path):
    folder = save(tmp_path / "run", ordinary())
    (page,) = write_page(folder)
    text = page.read_text()
    pictures_of = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures_of) == 3
    assert all("<text" in each and 'role="img"' in each for each in pictures_of)
    assert not re.findall(r"(?:fill|stroke): #(?!fff)[0-9a-f]{6}", "".join(pictures_of))
    assert "<title>0: 8 of 9 units stay</title>" in text  # to a pointer
    assert "<title>allocate: 176 s</title>" in text
    assert text.count(" calibration</title></use>") == text.count(" held out</title></use>") == 60
    assert "<title>15: 24.000% held out</title>" in text
    assert "var(--blue)" in text and "prefers-color-scheme: dark" in text
    identifiers = re.findall(r' id="([^"]*)"', text)
    assert len(set(identifiers)) == len(identifiers)
    referred = re.findall(r'(?:url\(#|href="#)([\w-]+)', text)
    assert set(referred) == set(identifiers)
    assert 'name="viewport"' in text and "default-src 'none'" in text.replace("&#x27;", "'")


def test_the_template_is_packaged():
    assert '"report/*.html"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_the_page_has_every_table_of_the_report(tmp_path):
    fields = ordinary(2, grid=GRID, latency=LATENCY)
    said = written(tmp_path, fields).text
    for table in Report.from_dict(fields).tables():
        assert f"{table.title} ({len(table.rows)})" in said
        assert all(cell in said for row in table.rows for cell in row)


def test_a_page_is_the_same_each_time(tmp_path):
    folder = save(tmp_path / "run", ordinary())
    first = write_page(folder)[0].read_bytes()
    assert write_page(folder)[0].read_bytes() == first


def test_markup_of_a_report_is_text(tmp_path):
    page = written(tmp_path, hostile(), png=tmp_path / "png")
    assert page.text.count(SCRIPT) >= 8
    assert "script" not in page.tags and "img" not in page.tags
    assert "\u202e" not in page.text and "\x00" not in page.text
    assert "$\\frac{1}$" in page.text
    assert len(list((tmp_path / "png").glob("*.png"))) == 3


def test_markup_in_a_folders_name_is_text(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    page = written(tmp_path, ordinary(2), name=name)
    assert name in page.text and "img" not in page.tags


@pytest.mark.parametrize("fields", [{}, wrong_kinds()], ids=["nothing", "wrong kinds"])
def test_what_is_missing_or_wrong_is_not_measured(fields, tmp_path):
    said = written(tmp_path, fields, png=tmp_path / "png").text
    assert "uality not measured" in said and "measure the quality" in said
    assert not (tmp_path / "png").exists()


PAGES: dict[str, str] = {}


def text_of_page(tmp_path, fields) -> str:
    """Return the text of a page; one is written for whatever is read for the first time.

    A page is made of what was read, and many a wrong value is read as nothing.
    """
    read = repr(vars(Report.load(save(tmp_path / "run", fields))))
    if read not in PAGES:
        PAGES[read] = written(tmp_path, fields).text
    return PAGES[read]


@pytest.mark.parametrize("field", sorted(ordinary()))
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": [None]}, math.nan, True, 10**400])
def test_any_field_may_be_anything(field, value, tmp_path, monkeypatch):
    if field not in ("sites", "seconds"):  # which the pictures show, and nothing else
        for picture in ("kept", "errors", "time_spent"):
            monkeypatch.setattr(pictures, picture, lambda *_: None)
    assert "run" in text_of_page(tmp_path, ordinary(2, **{field: value}))


@some("value", [None, -1, "nan", [1], 1e308, 0, 2**53], None, "nan", 1e308)
def test_any_field_of_a_site_may_be_anything(value, tmp_path):
    """A site for each field that is wrong, beside those that are right."""
    fields = ordinary(2)
    wrong = [{**site("0.mlp", 4, 2, 0.1), name: value} for name in site("0.mlp", 4, 2, 0.1)]
    fields["sites"] += wrong
    assert f"Sites ({4 + len(wrong)})" in text_of_page(tmp_path, fields)


def test_errors_of_pruned_layers_alone_are_drawn():
    rows = [site("0.mlp", 8, 4, 0.1), site("1.mlp", 8, 8, 0.0), site("2.mlp", 8, 4, 0.2)]
    sites = Report.from_dict({"sites": rows}).sites
    with pictures.drawing("report") as figures:
        (panel,) = pictures.errors(sites, figures).axes
        lines = [line.get_xydata() for line in panel.lines]
        assert [line[:, 0].tolist() for line in lines] == [[0, 1, 2]] * 2
        assert lines[0][[0, 2], 1].tolist() == [0.1, 0.2] and math.isnan(lines[0][1, 1])
        (panel,) = pictures.kept(sites, figures).axes
        heights = [bar.get_height() for bar in panel.patches]
        assert heights == [8, 8, 8, 4, 8, 4]


@pytest.mark.exhaustive
def test_a_report_of_a_million_sites_gives_a_page_that_opens(tmp_path):
    rows = [{"name": f"{at}.mlp", "units_before": 9, "units_after": 4} for at in range(10**6)]
    page = written(tmp_path, {"sites": rows})
    assert f"Of 1,000,000 sites the first {MOST_SITES:,} are shown." in page.text
    assert (tmp_path / "run.html").stat().st_size < 4 << 20


def test_a_report_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="more than 1,000 bytes"):
        write_page(save(tmp_path / "run", ordinary()))
    assert not (tmp_path / "run.html").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "can't be read"),
        (b"[]", "is a list and no object"),
        (b"\xff", "can't be read"),
        (b"[" * 10**5, "can't be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "can't be read"),
    ],
)
def test_a_torn_report_is_one_line(content, said, tmp_path, capsys):
    folder = save(tmp_path / "run", {})
    (folder / REPORT_JSON).write_bytes(content)
    assert main(["report", str(folder)]) == 2
    line = capsys.readouterr().err.replace("\nhint: ", "; ")
    assert said in line and line.count("\n") == 1 and line.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_without_a_report_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "no"):
        with pytest.raises(InputError, match="has no liar/report.json; give a folder that liar"):
            write_page(place)
    (tmp_path / REPORT_JSON).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / REPORT_JSON)  # which would never end
    with pytest.raises(InputError, match="has no"):
        write_page(tmp_path)


def test_the_folder_stays_as_it_was(tmp_path):
    folder = save(tmp_path / "run", ordinary())
    write_manifest(folder)
    before = sorted(folder.rglob("*"))
    store_bench(folder)
    assert write_page(folder) == [tmp_path / "run.html"]
    assert sorted(folder.rglob("*")) == before and strangers(folder) == []


def test_nothing_is_written_into_a_saved_folder(tmp_path, capsys):
    folder = save(tmp_path / "run", ordinary(4))
    write_manifest(folder)
    (tmp_path / "link").symlink_to(folder)
    own, loop = str(folder), tmp_path / "loop"
    loop.symlink_to(loop)
    for more in (
        ("report", own, "-o", f"{folder}/x.html"),
        ("report", own, "-o", f"{tmp_path}/link/README.md"),
        ("report", own, "--png", f"{folder}/pictures"),
        ("compare", own, "-o", f"{folder}/liar/x.html"),
    ):
        assert main([*more]) == 2
        assert f"lies in {folder}, whose files are listed" in capsys.readouterr().err
    assert strangers(folder) == []
    assert main(["report", str(loop)]) == 2
    assert "error: " in capsys.readouterr().err


def test_only_pages_of_ours_are_overwritten(tmp_path):
    folder = save(tmp_path / "run", ordinary(2))
    theirs = tmp_path / "theirs.html"
    theirs.write_text("<!DOCTYPE html>mine")
    link = tmp_path / "link.html"
    link.symlink_to(write_page(folder)[0])
    for path, said in (
        (theirs, "exists and liar report didn't write it"),
        (folder / REPORT_JSON, "didn't write it"),
        (tmp_path, "no ordinary file"),
        (link, "no ordinary file"),
        (tmp_path / "no" / "x.html", "there is no folder"),
    ):
        with pytest.raises(InputError, match=said):
            write_page(folder, path)
    assert theirs.read_text() == "<!DOCTYPE html>mine"
    assert write_page(folder)[0].read_text().startswith(MARK)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link.html",
        "run",
        "run.html",
        "theirs.html",
    ]


def test_a_place_that_may_not_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path / "run", ordinary(2))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["report", str(folder)]) == 2
    assert "may not be written to\nhint: give another name with -o" in capsys.readouterr().err
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["report", str(folder)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_pictures_are_written_where_they_are_wanted(tmp_path, capsys):
    folder = save(tmp_path / "run", ordinary(4))
    assert (
        main(["report", str(folder), "-o", str(tmp_path / "x.html"), "--png", str(tmp_path / "p")])
        == 0
    )
    names = [line.split(": written")[0] for line in capsys.readouterr().out.splitlines()]
    assert [Path(name).name for name in names] == [
        "x.html",
        "units.png",
        "errors.png",
        "seconds.png",
    ]
    for name in names[1:]:
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(folder), "--png", str(tmp_path / "x.html")]) == 2
    assert "can't write into" in capsys.readouterr().err


def test_a_full_disk_leaves_no_folder_for_pictures(tmp_path, capsys, monkeypatch):
    folder = save(tmp_path / "run", ordinary(4))
    (tmp_path / "own").mkdir()

    def full(path, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "atomic_write", full)
    for place in ("new/deep", "own"):
        assert main(["report", str(folder), "--png", str(tmp_path / place)]) == 2
        assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.html", "own"}


def test_pictures_replace_pictures_and_nothing_else(tmp_path, capsys):
    folder, pictures = save(tmp_path / "run", ordinary(4)), tmp_path / "p"
    command = ["report", str(folder), "--png", str(pictures)]
    assert main(command) == main(command) == 0
    own = tmp_path / "own.png"
    own.write_bytes(b"mine")
    for put in (lambda path: path.symlink_to(own), lambda path: path.write_bytes(b"mine")):
        (pictures / "errors.png").unlink()
        put(pictures / "errors.png")
        assert main(command) == 2
        assert "errors.png" in capsys.readouterr().err
        assert own.read_bytes() == (pictures / "errors.png").read_bytes() == b"mine"


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        write_page(save(tmp_path / "run", ordinary(2)))


def test_a_stored_benchmark_is_shown(tmp_path):
    folder = save(tmp_path / "run", ordinary(2))
    store_bench(folder, speed=1.25)
    said = Reader(write_page(folder)[0].read_text()).text
    assert "batch 32: decode, tokens/s" in said and "1.250 (1.188–1.312)" in said
    assert "× 1.25" in said and "liar export" in said and "liar bench" not in said


def test_a_benchmark_of_another_state_is_left_out_and_told_of(tmp_path):
    folder = save(tmp_path / "run", ordinary(2))
    path = store_bench(folder)
    save(folder, ordinary(2, keep=0.5))
    said = Reader(write_page(folder)[0].read_text()).text
    assert "is of another state of this folder" in said and "batch 32" not in said
    path.write_text("{")
    assert "left out: report: " in Reader(write_page(folder)[0].read_text()).text
    path.write_text(json.dumps({"version": 1, "rates": [None, {"batch": 1, "pruned": NASTY}]}))
    assert "left out" not in written(tmp_path, ordinary(2), name="other").text


def test_a_hostile_benchmark_is_text(tmp_path):
    folder = save(tmp_path / "run", ordinary(2))
    fields = json.loads(bench_of(folder).to_json())
    fields["rates"] = [{**rate, "what": NASTY, "unit": NASTY} for rate in fields["rates"]] * 1000
    fields["dense"]["name"] = NASTY
    fields["settings"] = fields["machine"] = {NASTY: [NASTY] * 1000}
    fields["pruned"]["peak"] = {NASTY: 5, "1": -3, "load": 2**70}
    tmp_path.joinpath("run.bench.json").write_text(json.dumps(fields))
    page = written(tmp_path, ordinary(2))
    assert SCRIPT in page.text and (tmp_path / "run.html").stat().st_size < 1 << 20


@pytest.mark.exhaustive
def test_the_pages_of_every_example_are_written(tmp_path):
    """What ``make screenshots`` shows in a browser."""
    pages = write_pages(tmp_path)
    assert len(list(tmp_path.glob("*.html"))) == 8 and all(page.is_file() for page in pages)
