"""Prove that a saved model is the one that was saved."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.fingerprint import compare_fingerprint, read_fingerprint
from liar_ext.checkpoint.loading import load_pruned, placement
from liar_ext.checkpoint.quietening import quiet
from liar_ext.checkpoint.reading import (
    read_marked_config,
    reading,
    stock_class,
)
from liar_ext.checkpoint.trust import check_code


def verify_pruned(folder: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """Reload a folder by every loader that it claims, and compare with the model that was saved.

    The output on the fixed input of the folder's fingerprint agrees if
    ``max |y − ŷ| ≤ √ε · max |y|``, ε of the model's dtype: half of its digits.

    Parameters
    ----------
    folder : path
        What :func:`liar_ext.save_pruned` wrote.
    device : str
        Where to run, as for :func:`liar_ext.checkpoint.load_model`; another device than the saved
        model's computes slightly other numbers.

    Returns
    -------
    dict
        ``agrees`` (all of them), ``layers`` ("equal" or "unequal"), ``dtype``, ``params``,
        ``tolerance``, and ``loaders``: by name ``max_abs_difference``, ``params``, ``agrees``.

    Raises
    ------
    InputError
        If the folder isn't one of ours, is damaged, has code that isn't ours, or there is no such
        device.

    Notes
    -----
    The loader in the folder is run only if it is, byte for byte, the one that ``save_pruned``
    writes; transformers then copies it to its cache of modules.
    """
    import transformers

    spread = placement(device)
    folder = Path(folder)
    config = read_marked_config(folder)
    autos = check_code(folder, config)
    fingerprint = read_fingerprint(folder)
    # First of all: it looks the folder over.
    loaders = {"liar_ext.load_pruned": load_pruned}
    if config["liar"]["layers"] == "equal":
        stock = stock_class(config, "load_pruned")
        loaders[f"transformers.{stock.__name__}.from_pretrained"] = partial(
            stock.from_pretrained, use_safetensors=True
        )
    for name in autos[:1]:
        loaders[f"transformers.{name}.from_pretrained(trust_remote_code=True)"] = partial(
            getattr(transformers, name).from_pretrained, trust_remote_code=True
        )
    results = {}
    for name, loader in loaders.items():
        with quiet(), reading(folder, "verify"):
            model = loader(
                folder, dtype=fingerprint.dtype, attn_implementation=fingerprint.attention, **spread
            )
        results[name] = compare_fingerprint(
            (model if spread else model.to(device)).eval(), fingerprint
        )
        del model
    return {
        "folder": str(folder),
        "agrees": all(result["agrees"] for result in results.values()),
        "layers": config["liar"]["layers"],
        "dtype": str(fingerprint.dtype).removeprefix("torch."),
        "params": fingerprint.params,
        "tolerance": fingerprint.tolerance,
        "loaders": results,
    }
