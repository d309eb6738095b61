"""Write the tables of families from their rows: docs/families.md and README.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from liar_ext.models.families import decoders, encoders, mixtures, vision
from liar_ext.models.registry import COLUMNS, NO, NONE, Entry, overview

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
OFTEN = 5  # families for which a reason is written once, above the table
UNITS = ("heads", "kv_groups", "channels", "experts", "hidden")
KINDS = {
    "language models": decoders.ROWS,
    "hybrids with linear attention, Mamba or convolutions": mixtures.HYBRIDS,
    "mixtures of experts": mixtures.ROWS,
    "encoders": encoders.ROWS,
    "encoder-decoders, speech": encoders.SEQUENCES,
    "vision, text with images or sound, diffusion": vision.ROWS,
}
LEGEND = {
    "can be removed": """
`KV groups` are key/value heads with the query heads that share them. `experts` are whole experts.
`hidden size` needs `--keep-hidden`.""",
    "cannot, and why": """
Encoders without KV groups have keys and values for every head. `layer by layer` is a schedule.""",
    "stock config": """
Units for which the family's own config can say a smaller number, equal in all layers. Such a folder
needs no loader.""",
    "bias fields": """
Config fields that give all these layers a bias. Without one, a new bias needs the loader in the
folder.""",
}


def summary(table: Mapping[str, Mapping[str, Entry]]) -> str:
    """Return the families by kind, with what can be removed from how many."""
    lines = ["| kind | families | can be removed |", "|---|---|---|"]
    for kind, rows in KINDS.items():
        names = [row.name for row in rows]
        counts = {unit: sum(_applies(table[name][unit]) for name in names) for unit in UNITS}
        said = [
            COLUMNS[unit] + ("" if count == len(names) else f" ({count} of {len(names)})")
            for unit, count in counts.items()
            if count
        ]
        lines.append(f"| {kind} | {', '.join(sorted(names))} | {', '.join(said)} |")
    return "\n".join(lines)


REFUSED = {
    "dimensions of queries and keys, apart from those of values (as CORP does)": (
        "The classes of transformers reshape queries, keys and values by one head size. No class "
        "and no runtime here loads another forward pass."
    ),
    "the image encoder of an image-text model": (
        "The rows of these models describe the language model. CLIP and SigLIP have their own."
    ),
    "videos, and images by their address, for [calibration](howto/image_text.md)": (
        "Only files below the folder of the `.jsonl` file are read."
    ),
    "[experts](moe.md#other-numbers-of-experts-in-each-layer), other numbers in each layer": (
        "The config of each family, and a GGUF file, has one number for all layers."
    ),
    "[mixtures of experts as GGUF](export.md#mixtures-of-experts)": (
        "Nine families with equal layers are written. llama.cpp computes phimoe and gpt_oss "
        "otherwise; the other families have no table of tensors yet."
    ),
    "single heads of Mamba-2 (nemotron_h, bamba, granitemoehybrid)": (
        "Its gated norm runs over all heads of a group, so removing one changes the others. Whole "
        "groups are exact: nemotron_h has several. bamba and granitemoehybrid have one by default, "
        "and their Mamba layers stay whole."
    ),
    "heads of lightning attention (minimax)": (
        "Its norm runs over all heads at once, so removing one changes the others. One config "
        "field also counts the heads of the other blocks."
    ),
    "experts of nemotron_h with `moe_latent_size`": (
        "They write fewer features than the residual stream has, and a projection follows."
    ),
    "pure Mamba models (mamba, mamba2, falcon_mamba)": (
        "No row describes their blocks. Channels of Mamba-1 meet in `x_proj`, which makes the time "
        "steps of all of them."
    ),
    "single attention or MLP layers, and blocks of encoder-decoders": (
        "`--keep-blocks` removes whole blocks of models with one stack of them, if the config can "
        "say which blocks stay. Blocks of Whisper, and attention layers alone, "
        "[lose more](experiments.md#depth) than narrower layers that are as fast."
    ),
    "the second attention of SD3.5's first blocks, and diffusion models that are no transformers": (
        "Their rows describe one attention in each block, and none a U-Net "
        "([limits](howto/diffusion.md#limits))."
    ),
    "Llama 4 with pictures (llama4)": (
        "transformers 5.24 can't run it: its forward asks the text model for outputs that it "
        "lacks. Prune its text model, llama4_text: load the folder by `AutoModelForCausalLM`, "
        "save it, and prune that."
    ),
    "speech models with another attention, such as WavLM and Conformers": (
        "Their attention gets relative positions for each head, which no row describes yet."
    ),
}


def placed(page: str, table: Mapping[str, Mapping[str, Entry]]) -> str:
    """Return a page with the families by kind between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", f"{BEGIN}\n\n{summary(table)}\n\n{END}", page, flags=re.S)


def numbered(table: Mapping[str, Mapping[str, Entry]]) -> dict[str, int]:
    """Return reasons that recur, with the numbers that stand for them in the table."""
    found = Counter(why for row in table.values() for _, why in (*_refused(row), _of_stock(row)))
    often = [why for why, count in found.most_common() if why and count >= OFTEN]
    return {why: number for number, why in enumerate(often, 1)}


def markdown(table: Mapping[str, Mapping[str, Entry]]) -> str:
    """Return the page of families."""
    numbers = numbered(table)
    lines = [
        "# Families that you can prune",
        "",
        "Find out what can be removed from your model, and whether the result needs a loader. If",
        "your family is missing, [run](extend.md#a-model-family) `liar families --suggest MODEL`.",
        "`make families` writes this page.",
        "",
        BEGIN,
        "",
        summary(table),
        "",
        END,
        "",
        "## Each family",
        "",
        *(f"- **{name}**: {' '.join(text.split())}" for name, text in LEGEND.items()),
        "",
        "Reasons that recur have numbers:",
        "",
        *(f"{number}. {why}" for why, number in numbers.items()),
        "",
        f"| family | {' | '.join(LEGEND)} |",
        "|" + "---|" * (len(LEGEND) + 1),
        *(
            f"| {name} | {' | '.join(_cells(row, numbers))} |".replace("  ", " ")
            for name, row in table.items()
        ),
        "",
        "## What is not pruned yet",
        "",
        "| asked for | why not |",
        "|---|---|",
        *(f"| {what} | {why} |" for what, why in REFUSED.items()),
    ]
    return "\n".join(lines) + "\n"


def _applies(entry: Entry) -> bool:
    return entry.applies not in (NO, NONE)


def _cells(row: Mapping[str, Entry], numbers: Mapping[str, int]) -> list[str]:
    yes = [
        COLUMNS[unit] + (f" ({row[unit].reason})" if row[unit].reason else "")
        for unit in UNITS
        if _applies(row[unit])
    ]
    no = [_said(*each, numbers) for each in _refused(row)]
    stock = row["stock"].applies
    if row["stock"].reason:
        stock += "; not " if _applies(row["stock"]) else ": "
        stock += _said(*_of_stock(row), numbers)
    biases = row["biases"].applies if _applies(row["biases"]) else NONE
    return [each.replace("|", "\\|") for each in (", ".join(yes), "; ".join(no), stock, biases)]


def _refused(row: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Return what is not possible for a family, and why; of encoders the legend says the rest."""
    names = {**{unit: COLUMNS[unit] for unit in UNITS}, "layerwise": "layer by layer"}
    return [
        (name, row[unit].reason)
        for unit, name in names.items()
        if (row[unit].applies == NO or (unit == "layerwise" and row[unit].reason))
        and row[unit].reason != "every head has keys and values of its own"
    ]


def _of_stock(row: Mapping[str, Entry]) -> tuple[str, str]:
    """Return the units whose number the stock config can't say, if named, and why not."""
    units, _, why = row["stock"].reason.rpartition(": ")
    return (units, why) if ": " not in units else ("", row["stock"].reason)


def _said(name: str, why: str, numbers: Mapping[str, int]) -> str:
    """Return what is not possible, and why, or the number of the reason."""
    if why in numbers:
        return f"{name} ({numbers[why]})"
    return f"{name}: {why}" if name and why else name or why


def main() -> None:
    """Write both pages."""
    table = overview()
    (ROOT / "docs" / "families.md").write_text(markdown(table), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(placed(path.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
