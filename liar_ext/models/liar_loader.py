"""Builds models whose layers differ in size, as config.json says; needs torch and transformers.

liar_ext writes this file into the folders of such models, so that they load without it::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It does the same for models of diffusers, of which it needs diffusers alone.

The class of transformers that is asked for is built; then, before any weight is read, its modules
get the sizes that ``liar`` in config.json names, by their path in the base model::

    modules       the shape of a parameter or buffer, or a number that a module keeps, by name; one
                  that it reads from its config by ``config.`` and the name; of a shape null is all
    head          the same outside of the base model; only of the class that was saved
    head_inputs   [position, keyword, heads]: an argument of forward that has one slice per head of
                  the dense model, of which those of the heads that are left are taken; no heads:
                  it is left out. [..., output, table]: where the output passes it on, to be whole
                  again there, and the embedding that makes it where it isn't given

A model that is built so is saved, by ``save_pretrained``, with this file and these sizes.
"""

from __future__ import annotations

import inspect
import shutil
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

LIBRARIES = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}
FILE = "liar_loader"
_WHOLE = "_liar_whole"  # a tensor for all heads, while a module runs


def pruned_class(stock: type) -> type:
    """Return the subclass of a class of a library that builds the sizes in its config.

    It goes by the name of the stock class, which is what config.json and other tools call it.
    """
    if stock.__module__ in (__name__, FILE):
        return stock
    if stock.__name__ not in globals():
        of_diffusers = hasattr(stock, "register_to_config")
        members = _diffusers_members(stock) if of_diffusers else _transformers_members(stock)
        # Else transformers adds this base, in one more class, which can't be pickled.
        more = [base for base in stock.__bases__ if base.__name__.endswith("GenerationMixin")]
        globals()[stock.__name__] = type(stock.__name__, (stock, *more), members)
    return globals()[stock.__name__]


def _transformers_members(stock: type) -> dict[str, Any]:
    def post_init(self: Any) -> None:
        resize(self)
        stock.post_init(self)

    members = {"post_init": post_init, "__module__": __name__, "__doc__": stock.__doc__}
    # Its weights go by the names of the stock class, in files of any age.
    return members | {"is_custom_code": classmethod(lambda cls: False)}


def _diffusers_members(stock: type) -> dict[str, Any]:
    def __init__(self: Any, *args: Any, liar: Any = None, auto_map: Any = None, **fields: Any):
        stock.__init__(self, *args, **fields)
        self.register_to_config(liar=liar)
        resize(self)

    def save_pretrained(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if Path(folder, f"{FILE}.py").resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, Path(folder, f"{FILE}.py"))
        stock.save_pretrained(self, folder, *args, **options)

    known = inspect.signature(stock.__init__)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("liar", "auto_map")
    ]
    __init__.__signature__ = known.replace(parameters=[*known.parameters.values(), *more])
    # A pipeline names the file by the module, and looks for it in the folder of the model.
    members = {"__init__": __init__, "save_pretrained": save_pretrained, "__doc__": stock.__doc__}
    return members | {"__module__": FILE, "_auto_class": "AutoModel"}


def __getattr__(name: str) -> type:
    """Return the class of that name; ``auto_map`` in config.json asks for it."""
    if name.startswith("__"):
        raise AttributeError(name)
    for library, base in LIBRARIES.items():
        module = import_module(library) if find_spec(library) else None
        stock = getattr(module, name, None)
        if isinstance(stock, type) and issubclass(stock, getattr(module, base)):
            return pruned_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resize(model: nn.Module) -> bool:
    """Give the modules of a model the sizes that its config names, once or several times.

    Returns
    -------
    bool
        Whether there was anything to do: the config says nothing of an ordinary model, nor of a
        model that is only a part of the base model.
    """
    said = getattr(model.config, "liar", None)
    modules = said.get("modules", {}) if isinstance(said, dict) else {}
    base = getattr(model, "base_model", model)
    inside = dict(base.named_modules())
    if not any(path in inside for path in modules):
        return False
    for path, sizes in modules.items():
        _set_sizes(path, base.get_submodule(path), sizes)
    if base is not model:
        outside = dict(model.named_modules())
        for path, sizes in said.get("head", {}).items():
            if path in outside:
                _set_sizes(path, outside[path], sizes)
    for path, (position, keyword, heads, *passed) in said.get("head_inputs", {}).items():
        module = base.get_submodule(path)
        if not selection_of(module):
            select_heads(module, heads, position, keyword, *passed)
    return True


def _set_sizes(path: str, module: nn.Module, sizes: dict[str, Any]) -> None:
    for name, size in sizes.items():
        old = getattr(module, name, None)
        if name in module._parameters and old is None:  # a bias that is new
            setattr(module, name, nn.Parameter(module.weight.new_zeros(size)))
        elif name in module._parameters:
            part = _part(f"{path}.{name}", old, size)
            setattr(module, name, nn.Parameter(part, requires_grad=old.requires_grad))
        elif isinstance(module._buffers.get(name), torch.Tensor):
            setattr(module, name, _part(f"{path}.{name}", old, size))
        elif name.startswith("config.") and hasattr(module, "config"):
            set_config_number(module, name.removeprefix("config."), size)
        elif isinstance(old, int | float | tuple):
            setattr(module, name, tuple(size) if isinstance(size, list) else size)
        else:
            raise ValueError(
                f"config.json names {path}.{name}, which {type(module).__name__} hasn't: the "
                "folder is damaged, or another version of transformers is needed"
            )


def _part(path: str, old: torch.Tensor, shape: list[int | None]) -> torch.Tensor:
    """Return the first rows and columns of a tensor, in memory of their own."""
    both = zip(shape, old.shape, strict=False)
    if len(shape) != old.ndim or any(n is not None and n > most for n, most in both):
        raise ValueError(
            f"config.json names the shape {shape} for {path}, the dense model has "
            f"{list(old.shape)}: the folder is damaged"
        )
    return old.detach()[tuple(slice(n) for n in shape)].clone()


class LayerConfig:
    """The config of a model as one of its modules reads it, with numbers of the module's own."""

    def __init__(self, shared: Any, own: dict[str, Any]) -> None:
        self.shared, self.own = shared, own

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "own"):  # while it is unpickled
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)


def set_config_number(module: nn.Module, name: str, value: int) -> None:
    """Let a module read a number of its own where its forward reads the config of the model."""
    own = config_numbers(module)
    shared = module.config.shared if own else module.config
    module.config = LayerConfig(shared, {**own, name: value})


def config_numbers(module: nn.Module) -> dict[str, int]:
    """Return what :func:`set_config_number` has set."""
    # Not by class: a folder's copy of this file has one of its own.
    config = vars(module).get("config")
    return dict(config.own) if type(config).__name__ == "LayerConfig" else {}


def select_heads(module: nn.Module, heads: Any, position: int, keyword: str, *passed: Any) -> None:
    """Let a module take the slices of its heads from an argument made for all heads.

    If it does so already, ``heads`` are of those that it takes. ``passed`` is nothing, or an output
    and a table: then the next module gets the argument as this one did, whole, or not at all where
    ``heads`` is None.
    """
    if known := _selecting(module):
        if known["heads"] is not None:
            known["heads"][:] = [known["heads"][index] for index in heads]
        return
    heads = None if heads is None else list(heads)
    output, table = passed or (None, "")
    if hasattr(module, table):
        getattr(module, table).register_forward_hook(partial(_take_columns, heads=heads))
    facts = {"heads": heads, "position": position, "keyword": keyword, "passed": passed}
    module.register_forward_pre_hook(partial(_take_heads, **facts), with_kwargs=True)
    if passed:
        hook = partial(_pass_on, output=output, table=table, drop=heads is None)
        module.register_forward_hook(hook)


def selection_of(module: nn.Module) -> list[Any]:
    """Return what ``head_inputs`` says of a module: nothing, or what it selects."""
    known = _selecting(module)
    heads = known.get("heads") and [*known["heads"]]
    return [known["position"], known["keyword"], heads, *known["passed"]] if known else []


def _selecting(module: nn.Module) -> dict[str, Any]:
    """Return what :func:`select_heads` has told the hooks of a module, if it did."""
    hooks = module._forward_pre_hooks.values()
    told = (hook.keywords for hook in hooks if isinstance(hook, partial))
    return next((each for each in told if "heads" in each), {})


def _take_heads(
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    *,
    heads: list[int] | None,
    position: int,
    keyword: str,
    passed: tuple,
) -> tuple[tuple, dict]:
    """Select heads from dimension 1 of one argument: a forward pre-hook."""
    arguments = dict(enumerate(args)) | kwargs
    key = keyword if keyword in kwargs else position
    given = arguments.get(key)
    if passed:
        vars(module)[_WHOLE] = given
    if isinstance(given, torch.Tensor):
        arguments[key] = None if heads is None else given[:, heads]
    return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}


def _take_columns(
    table: nn.Module, args: tuple, made: torch.Tensor, *, heads: list[int]
) -> torch.Tensor:
    """Select heads from the last dimension of what an embedding gives: a forward hook."""
    vars(table)[_WHOLE] = made.movedim(-1, 0)[None]
    return made[..., heads]


def _pass_on(
    module: nn.Module, args: tuple, result: tuple, *, output: int, table: str, drop: bool
) -> tuple:
    """Put the argument into the output as it came, for all heads: a forward hook."""
    whole = vars(module).pop(_WHOLE, None)
    if whole is None and hasattr(module, table):
        whole = vars(getattr(module, table)).pop(_WHOLE, None)
    if whole is None and not drop:
        return result
    return (*result[:output], None if drop else whole, *result[output + 1 :])
