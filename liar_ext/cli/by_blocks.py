"""``liar prune --max-memory``: the same job with one block of the model in memory at a time."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from torch import nn

from liar_ext.calibration.self_calibration import SELF
from liar_ext.cli.inputs import add_facts, check_tokenizer, load, writes
from liar_ext.cli.output import print_estimate, say
from liar_ext.cli.resume import checkpoint_of
from liar_ext.distributed import is_first
from liar_ext.errors import InputError
from liar_ext.models.running import predicts_next_token
from liar_ext.pipeline.folder import prune_folder
from liar_ext.pipeline.job import Job, prepare
from liar_ext.pipeline.streamed import describe
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.streams import Walk
from liar_ext.report.report import Report
from liar_ext.streaming.block_store import BlockStore

NONE_WRITTEN = (
    "The model wrote no calibration text of its own (--self-text), for which all of it must be in "
    "memory: text unlike that of the calibration set loses more."
)


def run_by_blocks(recipe: Recipe, options: argparse.Namespace, start: float) -> Report | None:
    """Run the job that the options and their recipe say, which began at ``start``."""
    if SELF in recipe.calibration:
        raise InputError(
            "prune: --calibration self has the model write text, for which it must be in memory; "
            "leave it or --max-memory out"
        )
    if recipe.keep_vocab != 1.0:
        raise InputError(
            "prune: --keep-vocab cuts the embeddings of the whole model in memory; leave it or "
            "--max-memory out"
        )
    if options.bank:
        raise InputError(
            "prune: --bank holds the sums of all layers, for which there must be memory; leave it "
            "or --max-memory out"
        )
    stores = []

    def open_store(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
        stores.append(BlockStore(name, dtype, device))
        check_tokenizer(name, stores[0].tokenizer)
        return stores[0].model, stores[0].tokenizer

    settled = replace(recipe, self_text=0.0)
    given = load(settled, loader=open_store, progress=options.progress)
    (store,) = stores
    if given.evaluation is not None and not predicts_next_token(store.model):
        raise InputError(
            "prune: --max-memory with --eval needs a causal language model, got "
            f"{type(store.model).__name__}; leave --eval out, and judge the result by liar eval "
            "DIR --text TEXT"
        )
    if writes(recipe, store.model):
        given.warnings.append(NONE_WRITTEN)
    if getattr(options, "dry_run", False):
        known = {"walk": Walk.of(store), "limit": options.max_memory}
        known["certify_on"] = given.certification
        lines = describe(prepare(Job(store.model, given.calibration, settled, **known)))
        if is_first():
            print_estimate(lines, options)
        return None
    loaded = time.perf_counter() - start

    def annotate(report: Report) -> None:
        report.seconds = {"load": loaded, **report.seconds, "save": 0.0}
        report.seconds["total"] = time.perf_counter() - start
        add_facts(report, given)

    with checkpoint_of(recipe, options) as saved:
        report = prune_folder(
            store,
            given.calibration,
            options.out,
            settled,
            max_memory=options.max_memory,
            evaluate_on=given.evaluation,
            certify_on=given.certification,
            overwrite=options.overwrite,
            saved=saved,
            annotate=annotate,
            progress=options.progress,
        )
    say(report, options, start)
    return report
