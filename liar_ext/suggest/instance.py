"""A tiny instance of a model class, and what a pass of it calls its blocks with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils._pytree import tree_leaves, tree_map_only

from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.stock_config import shapes_of
from liar_ext.models.configs import config_parts
from liar_ext.models.running import base_path, draw_inputs, evaluating
from liar_ext.suggest.small_config import CANDIDATES, SECONDS, TOKEN, TRIED, is_deep, shrink
from liar_ext.system.errors import one_line
from liar_ext.system.progress import quiet

MOST_NUMBERS, MOST_MODULES = 20_000_000, 5_000  # 160 MB of float64; a second to build
MOST_VARIANTS = 24
BATCH, TOKENS, DECODER_TOKENS = 2, 11, 9


class Refused(Exception):
    """A reason for which no row, or a part of one, can be proposed."""


class Instance(NamedTuple):
    """A tiny model with random weights in float64, and the arguments of its forward pass."""

    model: nn.Module
    inputs: dict[str, Tensor]


class Tried(NamedTuple):
    """The tiny models that a row is read from and proved on.

    ``instances`` is one, or two of sizes that differ; ``models`` are theirs, or the one and
    variants of it without weights; ``whole`` has all blocks and no weights, or is None.
    """

    instances: list[Instance]
    models: list[nn.Module]
    whole: nn.Module | None


def prepare(model_class: type[nn.Module], config: Any) -> Tried:
    """Build the tiny models of a class, from a config of any sizes."""
    first = make_instance(model_class, config)
    shapes = shapes_of(first.model)
    others = _possible(lambda each: _instance(model_class, shrink(config, *each)), SECONDS)
    other = next((each for each in others if shapes != shapes_of(each.model)), None)
    instances = [first] if other is None else [first, other]
    models = [each.model for each in instances]
    if len(models) == 1:  # then these tell numbers apart where no name of a field says what it is
        fields = first.model.config.to_dict()
        names = [name for name, value in fields.items() if type(value) is int and value > 1]
        vary = partial(with_field, first.model)
        models += _possible(lambda name: vary(name, 2 * fields[name]), names[:MOST_VARIANTS])
    whole = _possible(
        lambda each: build(model_class, shrink(config, *each, layers=True), "meta"),
        () if is_deep(config) else TRIED,
    )
    return Tried(instances, models, next(whole, None))


def attempt(make: Callable[[], Any]) -> Any:
    """Return what is made; None if it fails, as a stranger's class and config have own rules."""
    with suppress(Exception), quiet():
        return make()
    return None


def _possible(make: Callable[[Any], Any], options: Iterable[Any]) -> Iterator[Any]:
    """Yield what is made of options, but for what fails."""
    made = (attempt(partial(make, option)) for option in options)
    return (each for each in made if each is not None)


def with_field(
    model: nn.Module, name: str, value: Any, part_of: Callable[[Any], Any] = lambda config: config
) -> nn.Module:
    """Return a model without weights, one field of whose config, or of a part of it, differs."""
    config = copy.deepcopy(model.config)
    setattr(part_of(config), name, value)
    return build(type(model), config, "meta")


def make_instance(model_class: type[nn.Module], config: Any) -> Instance:
    """Return the first small version of a model that can be built and run."""
    reasons: list[str] = []
    for each in CANDIDATES:
        try:
            with quiet():
                found = _instance(model_class, shrink(config, *each))
        except Refused as error:
            reasons.append(str(error))
        except Exception as error:  # whatever a stranger's code raises
            reasons.append(f"{type(error).__name__}: {one_line(error, 160)}")
        else:
            first, again = (outputs(found) for _ in range(2))
            if first.shape != again.shape or not torch.equal(first, again):
                raise Refused(
                    "two equal forward passes give different outputs, so that nothing is proved"
                )
            return found
    raise Refused(f"no tiny instance could be built and run ({reasons[0]})")


def _instance(model_class: type[nn.Module], config: Any) -> Instance:
    model = build(model_class, config, "cpu")
    found = Instance(model, _inputs(model))
    outputs(found)
    return found


def build(model_class: type[nn.Module], config: Any, device: str) -> nn.Module:
    """Return a model of a config, with random weights in float64."""
    config = copy.deepcopy(config)
    make_plain(config)
    with _bounded(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = model_class(config)
    if device == "meta":
        return model.eval()
    if (numbers := count_params(model)) > MOST_NUMBERS:
        raise Refused(
            f"it has {numbers:,} weights where its config could not be made smaller, more than "
            f"{MOST_NUMBERS:,}"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(copy.deepcopy(config))
        for parameter in model.parameters():  # biases and norms too, so that each can be noticed
            if parameter.is_floating_point():
                base = parameter if parameter.ndim == 1 else torch.zeros_like(parameter)
                scale = 0.1 if parameter.ndim == 1 else 0.2
                parameter.copy_(base + scale * torch.randn_like(parameter))
    return model.to(torch.float64).eval()


@torch.no_grad()
def outputs(instance: Instance) -> Tensor:
    """Return all floating-point outputs of a model as one vector."""
    with evaluating(instance.model):
        given = instance.model(**instance.inputs)
    values = given.values() if isinstance(given, Mapping) else given
    tensors = [values] if isinstance(values, Tensor) else [v for v in values if torch.is_tensor(v)]
    found = [value.double().flatten() for value in tensors if value.is_floating_point()]
    result = torch.cat(found) if found else torch.empty(0)
    if not len(result) or not result.isfinite().all():
        raise Refused("its outputs are no finite tensors")
    return result


def make_plain(config: Any) -> None:
    """Let a config and its parts ask for no cache, and for code that takes float64."""
    config._attn_implementation = config._experts_implementation = "eager"
    for part in config_parts(config):
        if getattr(part, "use_cache", None):
            part.use_cache = False


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return random inputs for the forward pass of a model of tokens or images."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(1)
    if name == "input_ids":
        rows = model.get_input_embeddings().weight.shape[0]
        fields = {**config.to_dict(), **config.get_text_config().to_dict()}
        special = [value for key, value in fields.items() if TOKEN.fullmatch(key)]
        ordinary = torch.tensor([token for token in range(rows) if token not in special][:1000])
        reads = inspect.signature(model.forward).parameters
        given = {}
        parts = {"": TOKENS, "decoder_": DECODER_TOKENS}
        for part in parts if getattr(config, "is_encoder_decoder", False) else [""]:
            draw = torch.randint(len(ordinary), (BATCH, parts[part]), generator=generator)
            given[part + name] = ordinary[draw]
            if f"{part}attention_mask" in reads:
                given[f"{part}attention_mask"] = torch.ones_like(draw)
        return given
    if name == "pixel_values":
        return {name: draw_inputs(model, BATCH, TOKENS, generator)[name].to(torch.float64)}
    raise Refused(f"its forward pass takes {name}, and only tokens and images are known here")


def _bounded() -> AbstractContextManager:
    """Stop a model that has more modules than any real one, before it fills the memory."""
    before = count()

    def counted(*_: Any) -> None:
        if next(before) >= MOST_MODULES:
            raise Refused(f"it has more than {MOST_MODULES:,} modules")

    return registration.register_module_module_registration_hook(counted)


@dataclass
class Call:
    """One run of a module: its arguments, and its first tensor out."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor | None = None


cloned = partial(tree_map_only, Tensor, torch.clone)  # code may change arguments in place


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of what a module gave, or got."""
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], before: Callable | None = None, after: Callable | None = None
) -> Iterator[None]:
    """Call these around each run of some modules, as torch's hooks, with the path in front."""
    with ExitStack() as hooks:
        for path, module in modules.items():
            if before is not None:
                hook = module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                hooks.enter_context(hook)
            if after is not None:
                hooks.enter_context(module.register_forward_hook(partial(after, path)))
        yield


def find_stacks(instance: Instance) -> dict[str, list[Call]]:
    """Return how a model called its blocks, by the path of each list of them in the base model.

    Lists are in the order of computation.
    """
    model, calls = instance.model, _calls(instance)
    found: dict[str, list[Call]] = {}
    broken = ""
    for path, container in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        children = list(container.children())
        if not isinstance(container, nn.ModuleList | nn.Sequential) or inside:
            continue
        if len(children) < 2 or not all(map(_holds_layers, children)):
            continue
        runs = [[call for call in calls if call.module is child] for child in children]
        if not any(runs):
            continue  # of another input than tokens, such as images
        if any(len(each) != 1 for each in runs):
            broken = broken or f"not every module of {path} runs exactly once"
        elif not _is_chain([each[0] for each in runs]):
            broken = broken or f"modules of {path} don't read what the one before put out"
        else:
            found[path] = [each[0] for each in runs]
    if not found:
        raise Refused(broken or "there is no list of blocks that run one after another")
    prefix = base_path(model)
    for path in found:
        if not path.startswith(prefix):
            raise Refused(f"its blocks, {path}, are outside of the base model")
    order = {id(call): index for index, call in enumerate(calls)}
    paths = sorted(found, key=lambda path: order[id(found[path][0])])
    return {path.removeprefix(prefix): found[path] for path in paths}


def _calls(instance: Instance) -> list[Call]:
    """Return every run of a module in a forward pass, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []

    def before(_: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(Call(module, cloned(args), cloned(kwargs)))
        open_calls.append(calls[-1])

    def after(_: str, module: nn.Module, args: tuple, output: Any) -> None:
        open_calls.pop().output = cloned(first_tensor(output))

    with hooked(dict(instance.model.named_modules()), before, after):
        outputs(instance)
    return calls


def _holds_layers(module: nn.Module) -> bool:
    """Tell whether a module is more than one layer, and has weights that are matrices."""
    several = any(True for _ in module.children())
    return several and any(parameter.ndim >= 2 for parameter in module.parameters())


def _is_chain(runs: list[Call]) -> bool:
    """Tell whether each of some modules reads what the one before it put out."""
    reads = (first_tensor((call.args, call.kwargs)) for call in runs[1:])
    return all(
        one.output is not None and read is not None and torch.equal(one.output, read)
        for one, read in zip(runs, reads, strict=False)
    )
