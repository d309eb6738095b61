"""What a report says of a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liar_ext.report.tables import Table, figure
from liar_ext.untrusted import count, listing, mapping, number, record, text

PAIRS = ("tokens_per_byte", "bits_per_byte")
LIKENESS = ("cosine", "neighbours", "divergence", "agreement")


def read_vocabulary(value: Any) -> dict[str, Any]:
    """Read what a report has of a vocabulary; empty if that is not known."""
    facts = mapping(value)
    found = record(facts, before=count, after=count, kind=text, kept_of_text=number)
    if not found or not found["before"] or found["after"] is None:
        return {}
    read = {"alike_lines": count(facts.get("alike_lines")), "text": _names(facts.get("text"))}
    read["tokens_per_byte"] = _pair(facts.get("tokens_per_byte"))
    if held_out := _quality(facts.get("held_out")):
        pruned = _quality(mapping(facts["held_out"]).get("pruned"))
        read["held_out"] = held_out | ({"pruned": pruned} if pruned else {})
    return {**found, **read}


def _quality(value: Any) -> dict[str, Any]:
    """Read what a vocabulary gives on held-out text."""
    facts = mapping(value)
    known = {name: number(facts.get(name)) for name in LIKENESS}
    known |= {name: _pair(facts.get(name)) for name in PAIRS if name in facts}
    return {name: each for name, each in known.items() if each is not None}


def vocabulary(facts: Mapping[str, Any]) -> Table:
    """Return the table of a smaller vocabulary."""
    held_out = facts.get("held_out", {})
    pruned = held_out.get("pruned", {})
    rows = [
        ("tokens", f"{facts['before']:,}", f"{facts['after']:,}", ""),
        ("tokens per byte, text that chose", *_figures(facts.get("tokens_per_byte")), ""),
    ]
    for name in PAIRS:
        if name in held_out:
            last = _figures(pruned.get(name))[1] if name == "bits_per_byte" and pruned else ""
            rows.append((f"{name.replace('_', ' ')}, held out", *_figures(held_out[name]), last))
    for name in LIKENESS:
        if name in held_out:
            both = (figure(each.get(name), ".4g") for each in (held_out, pruned))
            rows.append((f"{name}, held out", "", *both))
    heads = ("", "all tokens", "fewer tokens", "pruned")
    return Table("Vocabulary", heads, rows, (0,), " ".join(vocabulary_lines(facts)))


def vocabulary_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return it in sentences."""
    if not facts:
        return []
    texts = ", ".join(facts.get("text", [])) or "the calibration text"
    kind = facts.get("kind") or "tokenizer"
    found = [
        f"{facts['after']:,} of {facts['before']:,} tokens stay ({kind}), chosen by their counts "
        f"in {texts}."
    ]
    if facts.get("alike_lines") is not None:
        found.append(
            f"{facts['alike_lines']:,} lines of it have no removed token: both tokenizers read "
            "them alike."
        )
    held_out = facts.get("held_out", {})
    if "bits_per_byte" in held_out:
        before, after = _figures(held_out["bits_per_byte"])
        found.append(f"Bits per byte of held-out text: {before} before, {after} after.")
    return found


def _names(value: Any) -> list[str]:
    return [text(each, 200) for each in listing(value)[:20]]


def _pair(value: Any) -> list[float | None]:
    found = [number(each) for each in listing(value)[:2]]
    return found + [None] * (2 - len(found))


def _figures(value: Any) -> tuple[str, str]:
    before, after = value or (None, None)
    return figure(before, ".4g"), figure(after, ".4g")
