"""Prove the steps of a residual stream: narrowed equals zeroed.

A norm takes a statistic over all features, so that setting some to zero changes what it puts out.
Not so where the features that leave repeat those that stay, equally often each::

    writers   W[P] ← W[K]       the mean, and the mean square, over all features is that over K
    norms     w[P] ← w[K]
    readers   W[:, P] ← 0       reads K alone, as after narrowing

Then the narrow model, sliced to K and nothing else, must put out what the wide one does. A head
that is tied to the embedding can't be zeroed; the norm before it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.discovery.blocks import first_tensor, watch
from liar_ext.discovery.instance import Instance, Refused
from liar_ext.discovery.places import Sources
from liar_ext.discovery.proof import NOTICED
from liar_ext.discovery.rows import registered
from liar_ext.errors import InputError, one_line
from liar_ext.models.family import Family
from liar_ext.models.residual_stream import Hidden, hidden_of, is_table, stream_of, weight_of
from liar_ext.models.running import evaluating
from liar_ext.plan import Plan, SitePlan
from liar_ext.surgery.units import apply_plan

CLOSE = 1e-5  # of the largest output: norms that compute in float32 sum fewer numbers


def prove_stream(instances: Sequence[Instance], family: Family) -> str:
    """Return in words what was proved of the stream of a row, on each of some instances.

    Raises
    ------
    Refused
        If a layer reads what the row doesn't say, or a narrowed model isn't the zeroed one.
    """
    worst = 0.0
    with registered(family):
        for instance in instances:
            hidden = narrowable(instance.model)
            _check_sources(instance, hidden)
            worst = max(worst, _compare(instance, hidden))
    said = f"to {worst:.0e} of the largest output" if worst else "exactly"
    return f"narrowed equals zeroed {said}: the hidden size"


def check_every_block(model: nn.Module, family: Family) -> None:
    """Refuse a stream that some block, of a model with all of them, doesn't have."""
    with registered(family):
        narrowable(model)


def narrowable(model: nn.Module) -> Hidden:
    """Return the hidden features of a model by its row.

    Raises
    ------
    Refused
        If the row isn't that of the model.
    """
    try:
        return hidden_of(model)
    except InputError as error:
        raise Refused(one_line(error, 300).removeprefix("hidden: ").partition("; ")[0]) from error
    except AttributeError as error:  # whatever a config of its own lacks
        raise Refused(f"its config says too little: {one_line(error, 120)}") from error


def _check_sources(instance: Instance, hidden: Hidden) -> None:
    """Refuse a row in which a layer reads another norm than it says."""
    paths = {module: path for path, module in instance.model.named_modules()}
    calls = {paths[call.module]: call for call in watch(instance)}
    for source in hidden.sources:
        # What is taken through no norm is read by all of them alike.
        of = calls.get(source.module)
        for path in (*source.readers, *source.tied):
            if path not in calls or of is None:
                continue
            read = of.output if source.norm else first_tensor((of.args, of.kwargs))
            given, call = Sources({source.module: read}), calls[path]
            if given.of(first_tensor((call.args, call.kwargs))) != (source.module, source.first):
                raise Refused(f"{path} reads something else than {source.name}")


@torch.no_grad()
def _compare(instance: Instance, hidden: Hidden) -> float:
    """Return by how much a narrowed model differs from the one with zeroed readers."""
    copies = next(n for n in range(2, hidden.size + 1) if hidden.size % n == 0)
    features = some_features(hidden.size, copies)
    wide = copy.deepcopy(instance.model)
    _repeat(wide, hidden, features, copies)
    narrow, before = copy.deepcopy(wide), _outputs(wide, instance.inputs)
    _zero(wide, hidden, features)
    expected = _outputs(wide, instance.inputs)
    try:
        apply_plan(narrow, Plan(wide.config.model_type, "auto", {}, hidden=features))
        given = _outputs(narrow, instance.inputs)
    except Exception as error:  # whatever a stranger's forward raises
        raise Refused(
            f"with a smaller hidden size the model fails: {type(error).__name__}: "
            f"{one_line(error, 120)}"
        ) from error
    kept, noticed, worst = list(features.kept), 0.0, 0.0
    for old, wanted, got in zip(before, expected, given, strict=True):
        if wanted.shape != got.shape and wanted.shape[-1] == hidden.size:
            old, wanted = old[..., kept], wanted[..., kept]
        if wanted.shape != got.shape:
            raise Refused("with a smaller hidden size the outputs have another size")
        scale = float(wanted.abs().max()) + 1e-12
        noticed = max(noticed, float((old - wanted).abs().max()) / scale)
        worst = max(worst, float((got - wanted).abs().max()) / scale)
    if noticed < NOTICED:
        raise Refused("zeroing readers of the stream changes no output, so nothing is compared")
    if not worst <= CLOSE:
        raise Refused(
            f"with a smaller hidden size the outputs are {worst:.1e} from those with zeroed readers"
        )
    return worst


def some_features(hidden: int, copies: int, count: int = 0) -> SitePlan:
    """Keep one of ``copies`` features, or ``count``, at random."""
    generator = torch.Generator().manual_seed(4)
    chosen = torch.randperm(hidden, generator=generator)[: count or hidden // copies]
    return SitePlan(hidden, tuple(chosen.sort().values.tolist()))


def _repeat(model: nn.Module, hidden: Hidden, features: SitePlan, copies: int) -> None:
    """Let the features that leave repeat those that stay, in every writer and norm."""
    index = torch.empty(hidden.size, dtype=torch.int64)
    index[list(features.kept)] = torch.tensor(features.kept)
    index[list(features.removed)] = torch.tensor(features.kept).repeat(copies - 1)
    alone = dict(model.named_parameters())
    for path in hidden.writers:
        if path in alone:
            alone[path].copy_(alone[path][..., index])
            continue
        layer = model.get_submodule(path)
        if is_table(layer):
            layer.weight.copy_(layer.weight[:, index])
            continue
        weight_of(layer).copy_(weight_of(layer)[index])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[index])
    for path in hidden.norms:
        for parameter in model.get_submodule(path).parameters():
            parameter.copy_(parameter[index])


def _zero(model: nn.Module, hidden: Hidden, features: SitePlan) -> None:
    """Let readers read nothing of the features that leave; the norm of a tied head says nothing."""
    gone, offset = list(features.removed), stream_of(model).norm_offset
    for index, source in enumerate(hidden.sources):
        for path in source.readers:
            weight_of(model.get_submodule(path))[:, gone] = 0
        if not source.tied:
            continue
        norm = model.get_submodule(source.module)
        weighted = source.norm and getattr(norm, "weight", None) is not None
        if not weighted or any(each.norm for each in hidden.sources[index + 1 :]):
            raise Refused(f"{source.tied[0]} is tied to the embedding, and reads no last norm")
        norm.weight[gone] = -offset
        if getattr(norm, "bias", None) is not None:
            norm.bias[gone] = 0


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the floating-point outputs of a model."""
    with evaluating(model):
        given: Any = model(**inputs)
    values = given.values() if isinstance(given, Mapping) else given
    values = [values] if isinstance(values, Tensor) else values
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
