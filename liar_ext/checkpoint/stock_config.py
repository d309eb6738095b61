"""The config that says the sizes that a model has now, and which loaders build them from it.

If the stock class of transformers can build the layers, stock fields say it all. Else the fields
stay those of the dense model, but for what every layer shares; ``per_layer_config`` has the sizes
of layers, and ``liar`` all that :mod:`liar_ext.models.liar_loader` resizes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from liar_ext.checkpoint.folder import LOADER_MODULE, MARK_VERSION
from liar_ext.models.layers import saved_tensors
from liar_ext.models.liar_loader import config_numbers, pruned_class, selection_of
from liar_ext.models.plan import Plan
from liar_ext.models.registry import (
    FAMILIES,
    Fields,
    config_parts,
    counts_layers,
    family_of,
    is_diffusion,
    put_config,
    skeleton,
)
from liar_ext.models.residual_stream import stream_of
from liar_ext.models.running import block_config
from liar_ext.models.sites import Site, get_consumer_bias, sites, why_whole
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.progress import quiet

LAYER_FIELDS = ("per_layer_config", "allow_global_per_layer_attribute_access")


def describe(model: nn.Module, pruning: Mapping[str, Any] | None = None) -> None:
    """Let the config of a model say its sizes, and its class build them, in place.

    After this ``model.save_pretrained(folder)`` writes a folder that loads again. The config is a
    new object; other models that share the old one keep theirs. ``pruning`` is what to remember of
    the job, beside that of earlier ones, as ``config.liar["history"]``.
    """
    with quiet():
        old, config = model.config, described(model, pruning)
    put_config(model, config)
    for module in model.modules():
        if module is not model and getattr(module, "config", None) is old:
            module.config = config
        elif config_numbers(module):
            module.config.shared = config
    wear(model)


def from_dense(model: nn.Module, plan: Plan) -> Plan:
    """Return what a plan for this model comes to for the dense one, if the way here is known.

    :func:`liar_ext.prune` and :func:`liar_ext.load_pruned` leave it on the model as ``liar_plan``.
    After slicing by hand the plan counts the units that came in, with a warning.
    """
    before = getattr(model, "liar_plan", None)
    try:
        return plan if before is None else plan.after(before)
    except InputError as error:
        warnings.warn(
            "the model isn't as liar_ext left it, so the plan counts the units that it came in "
            f"with, and not the dense model's ({error})",
            stacklevel=2,
        )
        return plan


def wear(model: nn.Module) -> None:
    """Give a model the class that builds the sizes in its config, if stock fields don't say all."""
    stock = stock_of(model)
    unequal = model.config.liar["layers"] == "unequal"
    if unequal and is_stock(stock):
        model.__class__ = pruned_class(stock)
        if not is_diffusion(model):
            # By this name save_pretrained puts the class into auto_map, where it is already.
            type(model)._auto_class = _loader(model)
    elif not unequal:
        model.__class__ = stock


def model_class(name: Any) -> type[nn.Module] | None:
    """Return the model class of transformers, or of diffusers for a known family, by its name."""
    import transformers

    found = getattr(transformers, str(name), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if name not in FAMILIES:
        return None
    try:
        import diffusers

        found = getattr(diffusers, name)
        is_model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
        return found if is_model else None
    except (ImportError, AttributeError):  # it isn't installed, or has none
        return None


def stock_of(model: nn.Module) -> type[nn.Module]:
    """Return the class of a model as its library has it, or its own class."""
    stock = model_class(type(model).__name__)
    return stock if stock is not None and isinstance(model, stock) else type(model)


def described(model: nn.Module, pruning: Mapping[str, Any] | None = None) -> Any:
    """Return a config that says the sizes of a model; refuse a model that no loader builds."""
    history = list(history_of(model.config)) + ([dict(pruning)] if pruning else [])
    config = dense_config(model.config)
    equal = equal_config(model, config)
    said = {"version": MARK_VERSION, "layers": "unequal" if equal is None else "equal"}
    if any(map(_differs, config_parts(config))):
        said["dense_layers_differ"] = True
    if history:
        said["history"] = history
    config = equal or _unequal_config(model, config, said)
    config.liar = said
    if equal is None and is_stock(stock_of(model)):
        what = f"config: {type(model).__name__} was changed by more than a smaller size of modules"
        with refusing(what, "remove what was added, or use torch.save", ValueError):
            built = shapes_of(skeleton(pruned_class(stock_of(model)), config))
            if unsaid := sorted(built.items() ^ shapes_of(model).items()):
                raise ValueError(f"no config says {unsaid[0][0]}")
    return config


def history_of(config: Any) -> list[dict[str, Any]]:
    """Return what earlier jobs have left in a config, the first one first."""
    said = getattr(config, "liar", None)
    return list(said.get("history", [])) if isinstance(said, Mapping) else []


def dense_config(config: Any) -> Any:
    """Return a copy of a config without what liar_ext, or a quantiser, has written into it."""
    config = Fields.from_dict(config) if isinstance(config, Mapping) else copy.deepcopy(config)
    said = getattr(config, "liar", None)
    ours = isinstance(said, Mapping) and not said.get("dense_layers_differ")
    for part in config_parts(config):
        if ours and _differs(part):
            part.per_layer_config = None
        for name in ("quantization_config", "auto_map", "liar", LAYER_FIELDS[1]):
            part.__dict__.pop(name, None)
    return config


def _differs(part: Any) -> bool:
    """Tell whether a config has sizes of single layers (``per_layer_config``)."""
    return getattr(part, "is_heterogeneous", False)


def equal_config(model: nn.Module, config: Any) -> Any | None:
    """Return a config from which the stock class builds exactly these layers, if there is one.

    The proof is to build it: names and shapes must be those of the model. Layers that want other
    values of one field disprove it, unless the dense model's own layers differ.
    """
    config = copy.deepcopy(config)
    uniform = not any(map(_differs, config_parts(config)))
    said: dict[tuple[str, str], int] = {}
    for site in sites(model):
        for name, size in (site.wiring.config or {}).items():
            first = said.setdefault((site.part.config, name), site.sizes[size])
            if first != site.sizes[size] and uniform:
                return None
            setattr(block_config(site.part, config), name, first)
    _set_shared(model, config)
    stock = _build(model, config)
    return config if stock is not None and shapes_of(stock) == shapes_of(model) else None


def _unequal_config(model: nn.Module, config: Any, said: dict[str, Any]) -> Any:
    """Return a config with the sizes of each layer; add to ``said`` what a loader has to resize."""
    shared = copy.deepcopy(config)
    _set_shared(model, shared)
    stock = _build(model, shared)
    if stock is not None and _covers(stock, model):
        config = shared
    else:
        stock = _build(model, config)
    said |= _differences(model, stock)
    for here, layers in _layers(model, config):
        # Most code reads the global sizes, which a config with such layers forbids by default.
        here.allow_global_per_layer_attribute_access = True
        here.per_layer_config = layers
    own = stock_of(model)
    if is_stock(own) and not is_diffusion(model):
        # Other heads are made for the hidden size in the config.
        narrower = sites(model)[0].d_out != sites(stock)[0].d_out
        config.auto_map = {
            auto: f"{LOADER_MODULE}.{(own if own in classes else classes[0]).__name__}"
            for auto, classes in _auto(model).items()
            if own in classes or not narrower
        } | {_loader(model): f"{LOADER_MODULE}.{own.__name__}"}
    return config


def _layers(model: nn.Module, config: Any) -> Iterable[tuple[Any, dict[int, dict[str, int]]]]:
    """Return configs of parts, each with the sizes of layers that differ from it."""
    configs = [part.config for part in family_of(model).all_parts]
    found: dict[str, tuple[Any, dict[int, dict[str, int]]]] = {}
    for site in sites(model):
        here = block_config(site.part, config)
        once = configs.count(site.part.config) == 1 and not site.part.repeats
        if not once or _differs(here) or not counts_layers(here):
            continue  # such a config can't say them
        for name, size in (site.wiring.config or {}).items():
            if getattr(here, name, site.sizes[size]) != site.sizes[size]:
                _, layers = found.setdefault(site.part.config, (here, {}))
                layers.setdefault(site.block, {})[name] = site.sizes[size]
    return found.values()


def _set_shared(model: nn.Module, config: Any) -> None:
    """Set the fields that all layers share: the hidden size, experts, and flags of biases."""
    governed: dict[tuple[str, str], list[Site]] = {}
    for site in sites(model):
        if site.wiring.bias_flag is not None:
            governed.setdefault((site.part.config, site.wiring.bias_flag), []).append(site)
    for (_, flag), at in governed.items():
        if all(get_consumer_bias(model, site) is not None for site in at):
            setattr(block_config(at[0].part, config), flag, True)
    fields, at = _narrowed_fields(model), [site for site in sites(model) if site.expert is not None]
    if len({site.experts for site in at}) == 1:
        names = (at[0].wiring.config or {}).items()
        fields |= {name: at[0].experts for name, size in names if size == "experts"}
    for name, size in fields.items():
        setattr(block_config(family_of(model), config), name, size)


def _build(model: nn.Module, config: Any) -> nn.Module | None:
    from huggingface_hub.errors import StrictDataclassError

    try:
        # Through a dict, as a loader reads it, so that the config's own rules are checked.
        return skeleton(stock_of(model), type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError):
        return None


def _covers(stock: nn.Module, model: nn.Module) -> bool:
    """Tell whether no parameter of a model is larger than that of the stock class.

    Nor may that class lack a module, or make a buffer of other sizes, as of rotary frequencies.
    """
    theirs, modules = shapes_of(stock), dict(stock.named_modules())
    buffers = {name: buffer.shape for name, buffer in stock.named_buffers()}
    there = all(name in modules for name, _ in model.named_modules())
    alike = all(buffers.get(name, b.shape) == b.shape for name, b in model.named_buffers())
    both = [(our, theirs[name]) for name, our in shapes_of(model).items() if name in theirs]
    fits = all(len(our) == len(most) and all(map(int.__le__, our, most)) for our, most in both)
    return there and alike and fits


def _differences(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    said: dict[str, Any] = {"modules": {}}
    base, other = (getattr(each, "base_model", each) for each in (model, stock))
    theirs, inside = dict(other.named_modules()), set(base.modules())
    for path, module in base.named_modules():
        if path in theirs and (sizes := _sizes(module, theirs[path])):
            said["modules"][path] = sizes
        if facts := selection_of(module):
            said.setdefault("head_inputs", {})[path] = facts
    theirs = dict(stock.named_modules())
    for path, module in model.named_modules():
        if module not in inside and path in theirs and (sizes := _sizes(module, theirs[path])):
            said.setdefault("head", {})[path] = sizes
    return said


def _sizes(ours: nn.Module, theirs: nn.Module) -> dict[str, Any]:
    stock, sizes = saved_tensors(theirs), {}
    for name, value in saved_tensors(ours).items():
        if name not in stock:
            sizes[name] = list(value.shape)
        elif stock[name].shape != value.shape:
            # A dimension that is whole follows fields such as vocab_size, which others may change.
            both = zip(value.shape, stock[name].shape, strict=True)
            sizes[name] = [None if n == most else n for n, most in both]
    for name, value in vars(ours).items():
        other = vars(theirs).get(name)
        numbers = all(isinstance(each, int | float | tuple) for each in (value, other))
        if numbers and value != other and not (name.startswith("_") or isinstance(value, bool)):
            sizes[name] = list(value) if isinstance(value, tuple) else value
    for name, value in config_numbers(ours).items():
        if value != getattr(theirs.config, name):
            sizes[f"config.{name}"] = value
    return sizes


def is_stock(stock: type) -> bool:
    """Tell whether a class is one of transformers, or diffusers, itself."""
    return model_class(stock.__name__) is stock


def _auto(model: nn.Module) -> dict[str, tuple[type, ...]]:
    """Return what each auto class of transformers may build from a config like the model's."""
    from transformers.models.auto import modeling_auto

    found, config = {}, type(model.config)
    for name in auto_names():
        mapping = getattr(modeling_auto, name)._model_mapping
        if mapping is not None and config in mapping:
            classes = mapping[config]
            found[name] = classes if isinstance(classes, tuple) else (classes,)
    return found


def auto_names() -> list[str]:
    """Return the names of transformers' auto classes of models."""
    from transformers.models.auto import modeling_auto

    return sorted(name for name in dir(modeling_auto) if name.startswith("AutoModel"))


def auto_classes(model: nn.Module) -> list[str]:
    """Return the names of transformers' auto classes that load this class of model."""
    own = stock_of(model)
    return [name for name, classes in _auto(model).items() if own in classes]


def _loader(model: nn.Module) -> str:
    """Return the auto class that loads a model with code; AutoModel if no class of its own does."""
    return min(auto_classes(model), default="AutoModel")


def how_to_load(model: nn.Module, plan: Plan) -> str:
    """Return a sentence on which loaders take a folder with this model, pruned by ``plan``."""
    if is_diffusion(model):
        return (
            "The stock class cannot build these layers. Load the folder with "
            "`liar_ext.load_pruned(folder)`, or with "
            "`diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)`, which needs no "
            "liar_ext, and put the model into a pipeline as its transformer."
        )
    if equal_config(model, dense_config(model.config)) is not None:
        auto = min(auto_classes(model), default=type(model).__name__)
        return f"The saved folder loads with plain `transformers.{auto}.from_pretrained(folder)`."
    needs = (
        "The stock class cannot build these layers, so the saved folder holds code that does: load "
        f"it with `transformers.{_loader(model)}.from_pretrained(folder, trust_remote_code=True)`, "
        "which needs no liar_ext, or with `liar_ext.load_pruned(folder)`."
    )
    if plan.hidden is not None and stream_of(model).multiple_of is None:
        return f"{needs} No config of {plan.model_type} can tell of a smaller hidden size."
    cut = [site for site in sites(model, attn_unit=plan.attn_unit) if site.name in plan.sites]
    stuck = {s.kind for s in cut if s.wiring.config is None and plan.sites[s.name].removed}
    options = [f"--sites {kind}" for kind in ("attn", "mlp") if stuck and kind not in stuck]
    if any(plan.sites[s.name].bias and s.wiring.bias_flag is None for s in cut):
        options.append("--reconstruct linear")
    narrowed = ""
    tied = plan.hidden is not None and "heads" in stream_of(model).config.values()
    if tied and not why_whole(model, "attn"):
        heads = len(plan.hidden.kept) // sites(model, ("attn",))[0].head_dim
        narrowed = f" {len(plan.hidden.kept)} hidden features go with {heads} heads in every layer."
    choices = " ".join([*options, "--uniform-layers"])
    return (
        f"{needs} With `{choices}` a folder needs no code, if the config of {plan.model_type} "
        f"allows the sizes.{narrowed}"
    )


def _narrowed_fields(model: nn.Module) -> dict[str, int]:
    """Return the config fields that a smaller hidden size sets; none if it is the dense one."""
    row = stream_of(model)
    if row is None:
        return {}
    site, dense = sites(model)[0], block_config(family_of(model), model.config)
    # Without sites of attention, its sizes stay those of the dense model.
    sizes = {**site.sizes, "hidden": site.d_out}
    if "head_dim" in row.config.values() and "head_dim" not in sizes:
        derived = dense.hidden_size // dense.num_attention_heads
        sizes["head_dim"] = getattr(dense, "head_dim", None) or derived
    fields = {name: sizes[size] for name, size in row.config.items() if size in sizes}
    same = all(getattr(dense, n) == fields[n] for n, s in row.config.items() if s == "hidden")
    return {} if same else fields


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the model's weights hold, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
