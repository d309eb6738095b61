"""``liar verify``: prove that a saved model is the one that was saved."""

from __future__ import annotations

import argparse
import json


def run(options: argparse.Namespace) -> int:
    """Reload, compare, print; return 1 if outputs differ."""
    from liar_ext import checkpoint

    facts = checkpoint.verify_pruned(options.folder, options.device)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"{facts['params']:,} parameters, {facts['layers']} layers, {facts['dtype']}")
        for loader, result in facts["loaders"].items():
            verdict = "same outputs" if result["agrees"] else "OTHER OUTPUTS"
            print(f"{loader}: {verdict}, difference {result['max_abs_difference']:.1e}")
    return 0 if facts["agrees"] else 1
