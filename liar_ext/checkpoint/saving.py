"""Save a pruned model to a folder, whole or not at all.

If the stock class can build the layers, any loader takes the folder. Otherwise config.json says the
dense sizes, and the real ones in ``per_layer_config`` and ``liar``, for ``load_pruned`` and for the
folder's ``liar_loader.py``. None of ``liar/`` is needed to load.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from liar_ext.checkpoint import folder as saved
from liar_ext.checkpoint.carrying import (
    carry,
    complete_config,
    license_of,
    source_folder,
    write_vocabulary,
)
from liar_ext.checkpoint.folder import write_fingerprint, write_manifest
from liar_ext.checkpoint.inspection import INDEX, WEIGHTS
from liar_ext.checkpoint.placing import beside, check_folder, put_in_place
from liar_ext.checkpoint.stock_config import described, wear
from liar_ext.models.plan import Plan
from liar_ext.models.registry import is_diffusion, put_config, source_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import sites
from liar_ext.system.errors import InputError, one_line, refusing
from liar_ext.system.progress import no_bars, quiet

SHARD_BYTES = 2 << 30  # a shard is held in memory until it is written


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    report: Any = None,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a pruned model to a folder: weights, config, tokenizer, plan, report and fingerprint.

    All is written beside the folder and takes its place at the end, at once, so that neither a
    failure nor a kill leaves half a folder or loses one. The model itself stays as it is. A model
    that was read from GGUF is saved as an ordinary one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model after :func:`liar_ext.apply_plan`.
    folder : path
        Where to write; its parents are made.
    plan : Plan, optional
        The plan that was applied; by default that of the report, or the one that
        :func:`liar_ext.prune` or :func:`load_pruned` left on the model.
    report : Report or mapping, optional
        Anything with ``save(folder)``, or a mapping for ``liar/report.json``; written last. If it
        has a dict ``seconds``, those of saving are put there as ``save``, and added to ``total``.
    tokenizer : optional
        Tokenizer or processor to save, with its chat template.
    source : path or str, optional
        The folder that the model was loaded from, whose other files go along: see
        :mod:`liar_ext.checkpoint.carrying`. By default the one that the model's config names.
    overwrite : bool
        Replace a folder that this function wrote before, and that nobody has changed since.

    Raises
    ------
    InputError
        If the folder exists or holds anything else, the plan isn't the one that pruned this model,
        the model's outputs aren't finite, or writing fails (a full disk, for one).
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"save_pruned: needs the pruned model first, got {type(model).__name__}")
    left = getattr(report, "plan", getattr(model, "liar_plan", None))
    plan = left if plan is None else plan
    if not isinstance(plan, Plan):
        raise InputError(
            f"save_pruned: needs the plan that was applied, got {type(plan).__name__}; give it as "
            "plan=, or a report of it as report="
        )
    check_folder(folder, overwrite)
    with writing(folder, overwrite) as path:
        fill_folder(model, path, plan, report=report, tokenizer=tokenizer, source=source)


@contextmanager
def writing(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder to write to, which takes the place of ``folder`` in the end, at once."""
    folder = Path(folder).resolve()
    hint = "nothing was left behind, free space or choose another folder"
    with refusing(f"save_pruned: can't write {folder}", hint, OSError, SafetensorError):
        with beside(folder) as path:
            yield path
            put_in_place(path, folder, overwrite)


def fill_folder(
    model: nn.Module,
    path: Path,
    plan: Plan,
    *,
    report: Any = None,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    shards: Shards | None = None,
    running: AbstractContextManager | None = None,
) -> None:
    """Write all that :func:`save_pruned` writes; ``shards`` have the weights already, if given.

    ``running`` is what lets the model run where its weights aren't in memory.
    """
    start = time.perf_counter()
    with quiet():
        config = described(model)
    _check_plan(model, plan, config)
    with quiet(), _wearing(model, config):
        if shards is None:
            model.save_pretrained(path)
        else:
            with no_bars():
                model.save_pretrained(path, state_dict={})  # which removes shards of that name
            shards.close()
    complete_config(path)
    save_tokenizer(tokenizer, path)
    (path / saved.OWN_FOLDER).mkdir()
    write_vocabulary(model, tokenizer, path)
    plan.save(path / saved.PLAN_FILE)
    _take_along(model, source, path, report, tokenizer is not None)
    if not is_diffusion(model):
        with running or nullcontext():
            write_fingerprint(model, path)
    _write_report(report, path, start)
    # As the umask says; safetensors writes 0600.
    mode = (path / saved.MARKER_FILE).stat().st_mode & 0o777
    for each in path.rglob("*"):
        if each.is_file():
            each.chmod(mode)
    write_manifest(path)


def _check_plan(model: nn.Module, plan: Plan, config: Any) -> None:
    """Refuse a plan that didn't make this model, or made one that a stock loader gets wrong."""
    units = {site.name: site.units for site in sites(model, attn_unit=plan.attn_unit)}
    experts = {site.team: site.experts for site in sites(model) if site.expert is not None}
    claims = [
        (f"units at {name}", site.kept, units.get(name, "no such site"))
        for name, site in plan.sites.items()
    ]
    claims += [
        (f"experts at {name}", layer.kept, experts.get(name, "none"))
        for name, layer in plan.experts.items()
    ]
    if plan.hidden is not None:
        claims.append(("hidden features", plan.hidden.kept, hidden_of(model).size))
    for what, kept, there in claims:
        if len(kept) != there:
            raise InputError(
                f"save_pruned: the plan leaves {len(kept)} {what}, the model has {there}; pass the "
                "plan that pruned this model"
            )
    said = config.liar
    resized = [*said.get("modules", {}).values(), *said.get("head", {}).values()]
    if said["layers"] == "unequal" and all(set(sizes) == {"bias"} for sizes in resized):
        raise InputError(
            "save_pruned: the plan removes nothing and only adds biases, which a stock loader of "
            f"{type(model).__name__} would drop silently; leave them out, or remove units too"
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, if there is one; whatever its Rust library raises is an OSError."""
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # of a full disk, for one
        raise OSError(f"the tokenizer can't be saved: {one_line(error)}") from error


@contextmanager
def _wearing(model: nn.Module, config: Any) -> Iterator[None]:
    """Give a model another config and its class, and no quantiser marks, for a while."""
    marks = [name for name in saved.QUANTISER_MARKS if name in vars(model)]
    own = {name: vars(model).pop(name) for name in marks}
    before, kind = model.config, type(model)
    put_config(model, config)
    wear(model)
    try:
        yield
    finally:
        put_config(model, before)
        model.__class__ = kind
        vars(model).update(own)


def _take_along(model: nn.Module, source: Any, folder: Path, report: Any, tokenizer: bool) -> None:
    """Copy what else the source folder holds, and write a model card if there is a report."""
    # The folder of a diffusion transformer has nothing else, and that of its pipeline too much.
    name = os.fspath(source or ("" if is_diffusion(model) else source_of(model)))
    found, said = source_folder(name), []
    if found is not None:
        said = carry(found, folder, model, tokenizer=tokenizer)
    elif name and (source is not None or not os.path.isdir(name)):
        said = [f"What else {name} holds could not be read, and stays behind."]
    if isinstance(getattr(report, "warnings", None), list):
        report.warnings += [each for each in said if each not in report.warnings]
    else:
        for each in said:
            warnings.warn(each, stacklevel=4)
    if hasattr(report, "to_card"):
        text = report.to_card(license_of(found))
        (folder / saved.CARD_FILE).write_text(text, encoding="utf-8")


def _write_report(report: Any, folder: Path, start: float) -> None:
    """Write the report, with the seconds since ``start`` as those of saving."""
    if isinstance(report, Mapping):
        text = json.dumps(report, indent=1) + "\n"
        (folder / saved.REPORT_JSON).write_text(text, encoding="utf-8")
    elif report is not None:
        seconds = getattr(report, "seconds", None)
        if isinstance(seconds, dict):
            before = seconds.get("save", 0.0)  # to another folder
            seconds["save"] = time.perf_counter() - start
            if "total" in seconds:
                seconds["total"] += seconds["save"] - before
        report.save(folder)


class Shards:
    """The weights of a model on their way to a folder, in shards of about ``size`` bytes."""

    def __init__(self, model: nn.Module, folder: Path, size: int = SHARD_BYTES) -> None:
        self._model, self._folder, self._size = model, folder, size
        self._waiting: dict[str, Tensor] = {}
        self._written: list[list[str]] = []  # names by shard
        self._bytes = self._params = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors by their name in the model; those that share memory come in one call."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        left_out = self._model._keys_to_ignore_on_save or ()
        kept = {name: value for name, value in tensors.items() if name not in left_out}
        kept = remove_tied_weights_from_state_dict(kept, self._model)
        for name, value in revert_weight_conversion(self._model, kept).items():
            self._waiting[name] = value.detach().cpu().contiguous()
            self._params += value.numel()
        if sum(value.nbytes for value in self._waiting.values()) >= self._size:
            self._write()

    def close(self) -> None:
        """Write what is left, give the shards their names, and write the index, last of all."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        where = {}
        for index, keys in enumerate(self._written):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._part(index).rename(self._folder / file)
            where |= dict.fromkeys(keys, file)
        facts = {"total_parameters": self._params, "total_size": self._bytes}
        text = json.dumps({"metadata": facts, "weight_map": where}, indent=2, sort_keys=True)
        (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index + 1:05}.safetensors"

    def _write(self) -> None:
        if self._waiting:
            self._bytes += sum(value.nbytes for value in self._waiting.values())
            path = self._part(len(self._written))
            self._written.append(list(self._waiting))
            save_file(self._waiting, path, metadata={"format": "pt"})
            self._waiting = {}
