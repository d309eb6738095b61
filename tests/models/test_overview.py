"""The table of what applies to each family says what its rows say."""

from __future__ import annotations

from dataclasses import replace

from test_docs import ROOT
from tiny import TINY, tiny

from bench.families import KINDS, markdown, placed, summary
from liar_ext.cli.info import families_in_text
from liar_ext.models.registry import COLUMNS, FAMILIES, Entry, overview
from liar_ext.models.sites import sites

PAGES = ("README.md", "docs/families.md")


def test_the_pages_are_up_to_date():
    """`make families` writes them, and each has the one table by kind."""
    table = overview()
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    assert pages["docs/families.md"] == markdown(table)
    for name, page in pages.items():
        assert page == placed(page, table) and summary(table) in page, name


def test_every_family_is_of_one_kind():
    names = [row.name for rows in KINDS.values() for row in rows]
    assert sorted(names) == sorted(FAMILIES)


def test_every_family_has_its_row_and_every_no_its_reason():
    table = overview()
    assert list(table) == sorted(FAMILIES)
    for name, row in table.items():
        assert list(row) == list(COLUMNS)
        assert all(each.reason for each in row.values() if each.applies == "no"), name


def test_the_table_says_what_models_of_the_family_have():
    table = overview()
    for name in ("llama", "bert", "gpt_neox", "dinov2"):
        row, kinds = table[name], {site.kind for site in sites(tiny(name))}
        assert {"attn", "mlp"} == kinds and name in TINY
        assert row["heads"] == row["channels"] == Entry("yes")
    assert table["llama"]["stock"] == Entry("heads, channels")
    assert table["llama"]["biases"] == Entry("attention_bias, mlp_bias")
    assert table["olmo2"]["heads"].applies == "no" and table["olmo2"]["channels"] == Entry("yes")
    assert table["stablelm"]["heads"] == Entry("yes", "only with qk_layernorm=False")
    assert table["minimax"]["heads"] == Entry("yes", "in the blocks that have any")
    assert table["lfm2"]["heads"] == Entry("yes", "and channels of convolutions")
    assert table["qwen3_next"]["heads"] == Entry("yes", "of linear attention, too")
    assert table["nemotron_h"]["heads"].reason.endswith("of Mamba by whole groups")
    assert table["mixtral"]["experts"] == Entry("yes")
    assert table["mixtral"]["stock"].applies == "heads, channels, experts"
    assert table["llama"]["experts"] == Entry("–")
    assert table["albert"]["layerwise"].applies == "no"
    assert table["bert"]["stock"].applies == "channels" and table["bert"]["stock"].reason
    assert table["bert"]["kv_groups"] == Entry("no", "every head has keys and values of its own")
    assert table["dinov2"]["stock"].applies == "heads"


def test_reasons_of_a_row_are_told(monkeypatch):
    lacking = {"attn": "a norm is over all heads", "hidden": "not yet", "stock": "a|b"}
    row = replace(FAMILIES["llama"], name="odd", attn=None, stream=None, without=lacking)
    monkeypatch.setitem(FAMILIES, "odd", replace(row, mlp=replace(row.mlp, config=None)))
    table = overview()
    assert table["odd"]["heads"] == Entry("no", "a norm is over all heads")
    assert table["odd"]["kv_groups"] == Entry("no", "heads can't")
    assert table["odd"]["stock"] == Entry("no", "a|b")
    line = next(line for line in markdown(table).splitlines() if line.startswith("| odd |"))
    assert line.count(" | ") == 4 and "| channels | heads: a norm is over all heads; " in line
    assert "a\\|b" in line
    assert "odd, heads: a norm is over all heads" in families_in_text(table)
