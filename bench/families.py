"""Print docs/families.md: the table of families, from its rows."""

from __future__ import annotations

from collections.abc import Mapping

from liar_ext.models.overview import COLUMNS, NO, Entry, overview

LEGEND = {
    "heads": "attention heads can be removed",
    "kv_groups": "key/value heads can, with the query heads that share them",
    "channels": "MLP channels can, in a mixture those of every expert, shared ones included",
    "experts": "whole experts of a mixture can; a dash stands where there are none",
    "hidden": "features of the residual stream can, by `--keep-hidden`",
    "biases": "the config fields by which the stock class gives all these layers a bias; without "
    "one, a bias that pruning adds to a layer that had none needs the loader in the folder",
    "stock": "of which units the config of the stock class can say a smaller number, equal in all "
    "layers, so that a folder needs no loader",
    "layerwise": "a job may go layer by layer, by `--schedule layerwise`",
}


def markdown(table: Mapping[str, Mapping[str, Entry]]) -> str:
    """Return the table as a page of the documentation."""
    lines = [
        "# Families",
        "",
        "What can be removed from a model of each family, and how the result loads. This page is",
        "written by `make families`; `liar families` prints the same. A row for a family that is",
        "lacking is proposed by `liar families --suggest MODEL`: see",
        "[extending](extend.md#a-model-family).",
        "",
        "| " + " | ".join(["family", *COLUMNS.values()]) + " |",
        "|" + "---|" * (len(COLUMNS) + 1),
        *(
            "| " + " | ".join([name, *(_cell(key, each) for key, each in row.items())]) + " |"
            for name, row in table.items()
        ),
        "",
        *(f"- **{COLUMNS[key]}**: {text}." for key, text in LEGEND.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(key: str, each: Entry) -> str:
    if not each.reason or key == "biases":
        return each.applies
    return f"{each.applies}{';' if each.applies != NO else ':'} {each.reason}".replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(overview()), end="")
