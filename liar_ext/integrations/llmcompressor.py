"""Modifiers of llm-compressor: prune before quantisation, in one recipe.

Importing this module makes both modifiers known to YAML recipes.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr, create_model, model_validator
from torch import Tensor, nn

from liar_ext.calibration.batches import FACTS, LABELS, Batch, read_batch
from liar_ext.integrations.linear_grams import calibrate_linears, linear_grams
from liar_ext.job.pruning import prune
from liar_ext.models.plan import Budget
from liar_ext.models.recipe import Recipe, plain
from liar_ext.models.recipe_fields import recipe_fields
from liar_ext.models.sites import Site, sites
from liar_ext.report.report import Report
from liar_ext.system.errors import InputError, refusing

with refusing(
    "llmcompressor: cannot be imported",
    "pip install llmcompressor in an environment of its own, since it takes other versions of "
    "transformers",
    Exception,
):
    from compressed_tensors.offload import is_distributed
    from compressed_tensors.utils import getattr_chain, match_named_modules, patch_attr
    from llmcompressor.core import Event, State, active_session
    from llmcompressor.modifiers import Modifier, ModifierFactory
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationMixin

__all__ = ["LIARGPTQModifier", "LIARPruningModifier"]

# What prune takes in Python, and all of a budget; oneshot is given the model and the data.
CHOICES = {
    each.name: each.default
    for each in recipe_fields()
    if each.metadata["in_python"] or each.name in Budget.__dataclass_fields__
}

_Choices = create_model(
    "_Choices",
    __base__=Modifier,
    **{name: (Any, plain(default)) for name, default in CHOICES.items()},
)


class LIARPruningModifier(_Choices):
    """Structured pruning with closed-form reconstruction, as a modifier of llm-compressor.

    It removes attention heads and MLP channels and solves what stays for what was removed, see
    :func:`liar_ext.prune`, when it is initialised: modifiers behind it find the sliced model.
    Padding, and where ``oneshot(use_loss_mask=True)`` what the loss mask leaves out, counts for
    nothing. With a :class:`LIARGPTQModifier` behind it, its one calibration pass serves both.

    Parameters
    ----------
    keep, of, tile, keep_hidden, kinds, criterion, allocation, reconstruct, ...
        Fields of :class:`liar_ext.Recipe` with the same meaning and default, but for those that
        say which model and data: those are ``oneshot``'s.
    preset : {"fast", "balanced", "best"}, optional
        Where the other fields begin.
    report_to : str, optional
        Folder that report, recipe and plan are written to.
    """

    preset: str | None = None
    report_to: str | None = None

    _report: Report | None = PrivateAttr(None)
    _grams: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _sequences: int = PrivateAttr(0)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the fields as a recipe, and set all of them, so that a saved recipe says all."""
        if not isinstance(given, Mapping):
            return given
        own = {"preset", "report_to", *Modifier.model_fields}
        choices = {name: value for name, value in given.items() if name not in own}
        known = {each.name for each in recipe_fields()}
        elsewhere = sorted((known - CHOICES.keys()) & choices.keys())
        if elsewhere:
            raise InputError(
                f"LIARPruningModifier: {', '.join(elsewhere)} is of the model or the data, which "
                "oneshot is given; leave it out here, and use the arguments of oneshot"
            )
        preset = given.get("preset")
        recipe = Recipe.build(**choices) if preset is None else Recipe.preset(preset, **choices)
        return {**given, **{name: plain(getattr(recipe, name)) for name in CHOICES}}

    @property
    def recipe(self) -> Recipe:
        """The fields, as :func:`liar_ext.prune` takes them."""
        return Recipe.build(**{name: getattr(self, name) for name in CHOICES})

    @property
    def report(self) -> Report:
        """What came of pruning: the report, with the plan. InputError before ``oneshot``."""
        if self._report is None:
            raise InputError("LIARPruningModifier: no report yet; run oneshot with it first")
        return self._report

    def on_initialize(self, state: State, **kwargs: object) -> bool:
        """Prune the model of the session on its calibration data."""
        if state.data.calib is None:
            raise InputError(
                "LIARPruningModifier: pruning needs activations, and oneshot has no calibration "
                "data; give it dataset=..., a DataLoader or a set with a text column"
            )
        if is_distributed():
            raise InputError(
                "LIARPruningModifier: every process has other calibration data, and would prune "
                "another way; run oneshot with it in one process"
            )
        model, at = state.model, sites(state.model, attn_unit=self.attn_unit)
        self._check_groups(at)
        batches = list(calibration_batches(model, state.data.calib))
        bank = None
        if any(isinstance(each, LIARGPTQModifier) for each in _modifiers()):
            if self.keep_hidden != 1.0:
                raise InputError(
                    "LIARGPTQModifier: the Grams are of the dense hidden size, which keep_hidden "
                    "changes; use GPTQModifier, which calibrates by itself"
                )
            bank = calibrate_linears(model, batches, sites(model), self.memory)
        earlier = getattr(model, "liar_plan", None)
        self._report = prune(model, batches, self.recipe, bank=bank)
        _check_sizes(model)
        _save_with_own_config(model)
        if bank is not None:
            self._grams = linear_grams(bank, at, self._report.plan, earlier)
            self._sequences = int(bank.source["sequences"])
        if self.report_to is not None:
            Path(self.report_to).mkdir(parents=True, exist_ok=True)
            self._report.save(self.report_to)
            self._report.plan.save(Path(self.report_to) / "plan.json")
        return True

    def _check_groups(self, at: Sequence[Site]) -> None:
        """Refuse channels that a quantiser can't cut into its groups, before calibration."""
        widest = max((site.units for site in at if site.kind == "mlp"), default=0)
        step = self.recipe.budget.step(widest)
        for each, size in _groups():
            if "mlp" in self.kinds and self.keep < 1 and step % size:
                raise InputError(
                    f"LIARPruningModifier: {type(each).__name__} quantises groups of {size} "
                    f"inputs, and channels are kept in multiples of {step}; set tile={size}"
                )


class LIARGPTQModifier(GPTQModifier):
    """GPTQ on the Gram matrices of a :class:`LIARPruningModifier` before it, without a pass.

    Fields are those of ``GPTQModifier``. The Hessian of a layer is ``2 G_KK``, K the features that
    it still reads: exact for the dense model's activations, where ``GPTQModifier`` measures those
    of the model that is pruned already and quantised up to this layer. Padding isn't counted, as
    it is by ``GPTQModifier``.
    """

    requires_calibration_data: bool = False  # nor does any pipeline run the model

    _pruning: LIARPruningModifier | None = PrivateAttr(None)

    def on_initialize(self, state: State, **kwargs: object) -> bool:
        """Find the modifier that prunes, and set up quantisation."""
        before = itertools.takewhile(lambda each: each is not self, _modifiers())
        found = [each for each in before if isinstance(each, LIARPruningModifier)]
        if not found:
            raise InputError(
                "LIARGPTQModifier: needs the Grams of a LIARPruningModifier before it in the "
                "recipe; put one there, or use GPTQModifier, which calibrates by itself"
            )
        self._pruning = found[-1]
        return super().on_initialize(state, **kwargs)

    def on_calibration_start(self, state: State, event: Event, **kwargs: object) -> None:
        """Do all that GPTQ does but for its sums."""
        super().on_calibration_start(state, event, **kwargs)
        # Another modifier's calibration may run the model, and would add to the Hessians.
        self.remove_hooks(self._hooks - self._calibration_hooks)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: object
    ) -> None:
        """Quantise modules, with Hessians from the Grams of pruning."""
        grams, unknown = self._pruning._grams, []
        for module in modules:
            quantised = getattr_chain(module, "quantization_scheme.weights", None) is not None
            name = self._module_names.get(module)
            if not quantised or name is None or isinstance(module, nn.Embedding):
                continue
            if name not in grams:
                unknown.append(name)
                continue
            device = module.weight.device
            self._hessians[module] = 2 * grams[name].to(device)
            self._num_samples[module] = torch.tensor(float(self._pruning._sequences)).to(device)
        if unknown:
            raise InputError(
                f"LIARGPTQModifier: no Gram of {', '.join(unknown[:4])}, which lie outside of the "
                "blocks; add them to ignore, or use GPTQModifier"
            )
        super().on_sequential_epoch_end(state, event, modules, **kwargs)

    def on_finalize(self, state: State, **kwargs: object) -> bool:
        """Let go of the Grams."""
        self._pruning._grams.clear()
        return super().on_finalize(state, **kwargs)


def _modifiers() -> Sequence[Modifier]:
    """Return all modifiers of the recipe in work."""
    return active_session().lifecycle.recipe.modifiers


def _groups() -> Iterator[tuple[QuantizationMixin, int]]:
    """Yield each modifier that quantises in groups, with the inputs of a group."""
    for each in _modifiers():
        if isinstance(each, QuantizationMixin) and not each.bypass_divisibility_checks:
            for scheme in each.resolved_config.config_groups.values():
                size = getattr_chain(scheme, "weights.group_size", None)
                if size is not None and size > 0:
                    yield each, size


def _check_sizes(model: nn.Module) -> None:
    """Refuse what came out, where a quantiser's groups don't divide it."""
    for each, size in _groups():
        for path, layer in match_named_modules(model, each.resolved_targets, each.ignore):
            if layer.weight.shape[1] % size:
                raise InputError(
                    f"LIARPruningModifier: {path} reads {layer.weight.shape[1]} features, which "
                    f"groups of {size} inputs don't divide; give {type(each).__name__} smaller "
                    'groups, add the layer to its ignore, or set kinds=["mlp"]'
                )


def _save_with_own_config(model: nn.Module) -> None:
    """Let a model be saved with its config, and not with that of the folder it came from.

    The ``save_pretrained`` of ``oneshot`` copies that folder's config.json if the config names it.
    """
    save, owner = model.save_pretrained, weakref.ref(model)

    @functools.wraps(save)  # its mark that it stands there already, too
    def save_pretrained(*args: object, **settings: object) -> object:
        with patch_attr(owner().config, "_name_or_path", ""):
            return save(*args, **settings)

    model.save_pretrained = save_pretrained


def calibration_batches(model: nn.Module, dataloader: Any) -> Iterator[Batch]:
    """Yield the batches of a loader in the form that pruning takes, padding marked as such.

    Of each batch the arguments of the model's forward count. A ``loss_mask`` leaves out more
    tokens; folds alternate over sequences, so that sequences of one document should not be
    neighbours.
    """
    known = {*inspect.signature(model.forward).parameters, *LABELS, *FACTS}
    sequences = 0
    for batch in dataloader:
        if not isinstance(batch, Mapping):
            raise InputError(
                "LIARPruningModifier: a batch must be a mapping with input_ids, got "
                f"{type(batch).__name__}; let the collate function return a dict"
            )
        given = {name: value for name, value in batch.items() if name in known}
        read, loss_mask = read_batch(given, sequences), batch.get("loss_mask")
        sequences += len(read)
        if loss_mask is not None:
            mask = loss_mask.bool() if read.mask is None else read.mask & loss_mask.bool()
            read = replace(read, mask=mask)
        yield read


ModifierFactory.register("LIARPruningModifier", LIARPruningModifier)
ModifierFactory.register("LIARGPTQModifier", LIARGPTQModifier)
