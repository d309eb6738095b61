"""The section ``heal`` of a report: reading, sentences and table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liar_ext.report.tables import Table, figure
from liar_ext.untrusted import count, listing, mapping, named, number, text

MOST_POINTS = 1000  # of the curve
APART = "Errors, perplexity and divergence elsewhere in this report were measured before healing."


def read_healing(value: Any) -> dict[str, Any]:
    """Read the section; empty if the model was not healed."""
    facts = mapping(value)
    if not facts:
        return {}
    points = [listing(each) for each in listing(facts.get("curve"))[:MOST_POINTS]]
    return {
        **named({key: each for key, each in facts.items() if key != "curve"}),
        "before": number(facts.get("before")),
        "after": number(facts.get("after")),
        "improved": facts.get("improved") is True,
        "tokens": count(facts.get("tokens")),
        "seconds": number(facts.get("seconds")),
        "curve": [[count(p[0]), number(p[1])] for p in points if len(p) == 2],
        "perplexity": [number(each) for each in listing(facts.get("perplexity"))[:2]],
        "notes": [text(each) for each in listing(facts.get("notes"))[:MOST_POINTS]],
    }


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Return what healing did; nothing if the model was not healed."""
    if not found:
        return []
    cost = f"{figure(found['tokens'], ',')} tokens and {figure(found['seconds'], '.0f')} s"
    early = " (interrupted)" if found.get("interrupted") is True else ""
    before, after = figure(found["before"], ".4g"), figure(found["after"], ".4g")
    if found["improved"]:
        said = [
            f"Trained towards the dense model for {cost}{early}: held-out loss {before} → {after}."
        ]
    else:
        said = [
            f"Trained towards the dense model for {cost}{early}, without gain: the held-out loss "
            f"never fell below {before}, so the weights are those before healing."
        ]
    perplexity = found.get("perplexity")
    if perplexity:
        values = " → ".join(figure(each, ".2f") for each in perplexity)
        said.append(f"Perplexity on the evaluation text: {values}.")
    return [*said, *found.get("notes", ())]


def healing(found: Mapping[str, Any]) -> Table:
    """Return the curve of the held-out loss and the settings."""
    rows = [
        (f"held-out loss after {figure(tokens, ',')} tokens", figure(loss, ".4g"))
        for tokens, loss in found["curve"]
    ]
    apart = ("before", "after", "improved", "interrupted", "curve", "perplexity", "notes")
    rows += [(key.replace("_", " "), text(each)) for key, each in found.items() if key not in apart]
    return Table("Healing", ("", ""), rows, (0, 1), " ".join([*sentences(found), APART]))
