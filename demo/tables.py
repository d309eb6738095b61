"""What the demo measured, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence


def report(results: dict) -> str:
    """Return the report of both jobs as Markdown."""
    return "\n".join(
        [
            *encoder_part(results["encoder"]),
            "",
            *decoder_part(results["decoder"]),
            "",
            f"Speed is the median of runs in turns, {results['threads']} threads. "
            f"All took {minutes(sum(results['seconds'].values()))}.",
            "",
        ]
    )


def encoder_part(result: dict) -> list[str]:
    """Return the lines on the encoder."""
    models = result["models"]
    articles = next(iter(models.values()))["articles"]
    numbers = {name: [of[name] for of in models.values()] for name in next(iter(models.values()))}
    recall = f"recall@1, title to body, {articles} news articles"
    rows = [
        ("parameters (millions)", [f"{each / 1e6:.1f}" for each in numbers["parameters"]]),
        (recall, [f"{each:.3f}" for each in numbers["recall_at_1"]]),
        ("sentences per second", per_second(numbers["sentences_per_second"])),
    ]
    lines = ["## A sentence encoder with half of its heads, channels and tokens", ""]
    lines += [*block(result["lines"]), *table(["all-MiniLM-L6-v2", *models], rows), ""]
    for name, of in list(models.items())[1:]:
        lines.append(
            f"With {name} of them, {of['found_by_dense_only']} articles are found by the dense "
            f"model alone and {of['found_by_this_only']} by the pruned one alone. Calibration took "
            "other articles, and no pairs."
        )
    return lines


def decoder_part(result: dict) -> list[str]:
    """Return the lines on the language model."""
    models = result["models"]
    first = next(iter(models.values()))
    numbers = {name: [of[name] for of in models.values()] for name in first}
    read = f"perplexity, {first['tokens']:,} tokens of held-out news"
    equal = f"first tokens equal to the dense model's, of {first['new_tokens']}"
    rows = [
        ("parameters (millions)", [f"{each / 1e6:.1f}" for each in numbers["parameters"]]),
        (read, [f"{each:.2f}" for each in numbers["perplexity"]]),
        ("prompt, tokens per second", per_second(numbers["prefill_tokens_per_second"])),
        ("greedy decoding, tokens per second", per_second(numbers["decode_tokens_per_second"])),
        (equal, [", ".join(map(str, each)) for each in numbers["equal_tokens"]]),
        ("phrases of 3 tokens that repeat", [f"{each:.0%}" for each in numbers["repeated"]]),
    ]
    lines = ["## A causal language model at 90 %", "", *block(result["lines"])]
    lines += [*table(["SmolLM2-135M-Instruct", *models], rows), ""]
    lines.append("How each goes on after the same openings of held-out articles, greedily:")
    for index, prompt in enumerate(result["prompts"]):
        lines += ["", f"> {shortened(prompt)}", ""]
        lines += [f"- {name}: {of['continuations'][index]}" for name, of in models.items()]
    return [*lines, "", *what_holds(models)]


def what_holds(models: dict[str, dict]) -> list[str]:
    """Return what the numbers say about each pruned model, and what they don't."""
    (_, dense), *pruned = models.items()
    lines = [
        f"At {name} of its heads' and channels' parameters the perplexity is "
        f"{of['perplexity'] / dense['perplexity']:.2f} times the dense model's, and greedy text "
        f"repeats {of['repeated']:.0%} of its phrases (dense: {dense['repeated']:.0%})."
        for name, of in pruned
    ]
    lines.append(
        "Perplexity says how well news is predicted, not whether what is written is true; three "
        "openings are an impression. Nothing was retrained."
    )
    return lines


def per_second(speeds: Sequence[float]) -> list[str]:
    """Return speeds; those after the first with their ratio to it."""
    first = speeds[0]
    return [f"{first:,.0f}", *(f"{speed:,.0f} ({speed / first:.2f}×)" for speed in speeds[1:])]


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return a Markdown table whose columns also line up on a terminal."""
    cells = [list(head), *([title, *values] for title, values in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"| {row[0].ljust(widths[0])} | "
        + " | ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in cells
    ]
    rule = "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return [lines[0], f"|{'-' * (widths[0] + 2)}|{rule}", *lines[1:]]


def block(lines: Sequence[str]) -> list[str]:
    """Return lines as a block of code."""
    return [*(f"    {part}" for line in lines for part in line.splitlines()), ""]


def shortened(text: str, most: int = 160) -> str:
    """Return the end of a text on one line."""
    return text if len(text) <= most else "… " + text[-most:].partition(" ")[2]


def minutes(seconds: float) -> str:
    """Return a duration as a person says it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
