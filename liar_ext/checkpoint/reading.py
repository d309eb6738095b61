"""Read a folder's weights with transformers, and turn what it raises into one line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from liar_ext.checkpoint.carrying import MODULES_FILE
from liar_ext.checkpoint.folder import MARK_VERSION, OLD_MARK_VERSION
from liar_ext.checkpoint.inspection import CLASS_NAME, LARGEST, Folder, read_config
from liar_ext.checkpoint.stock_config import describe, model_class
from liar_ext.models.configs import config_parts, counts_layers, skeleton
from liar_ext.models.liar_loader import pruned_class, resize
from liar_ext.models.plan import Plan
from liar_ext.models.slicing import apply_plan
from liar_ext.system.errors import InputError, one_line
from liar_ext.system.progress import quiet

SAFELY = {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
# Transformers 5.25 takes kernels of the hub by default: code of others, and other bits.
PLAINLY = {"use_kernels": False}


def read_marked_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a pruned folder's config, with a mark that this version can read."""
    fields = read_config(folder, "load_pruned")
    mark = fields.get("liar")
    if mark is None:
        raise InputError(
            f"load_pruned: {folder} holds a dense model; give a folder that liar prune wrote, load "
            "it with transformers, or save what apply_plan sliced by save_pruned(model, folder, "
            "plan)"
        )
    mark = mark if isinstance(mark, Mapping) else {"version": mark}
    version, layers = mark.get("version"), mark.get("layers")
    if version not in (OLD_MARK_VERSION, MARK_VERSION) or isinstance(version, bool):
        raise InputError(
            f"load_pruned: {folder} has version {str(version)[:40]}, not {OLD_MARK_VERSION} or "
            f"{MARK_VERSION}; read it with the liar_ext that wrote it"
        )
    if layers not in ("equal", "unequal"):
        raise InputError(
            f"load_pruned: {folder} says its layers are {str(layers)[:40]!r}, which must be equal "
            "or unequal; copy the folder again"
        )
    sizes = f"sizes up to {LARGEST:,}"  # before a model is built by them
    for part, is_right, kind in (
        ("modules", _are_sizes, sizes),
        ("head", _are_sizes, sizes),
        ("head_inputs", _is_head_input, "[position, keyword, heads]"),
    ):
        modules = mark.get(part, {})
        for path, said in modules.items() if isinstance(modules, Mapping) else [(part, None)]:
            if not is_right(said):
                raise InputError(
                    f"load_pruned: config.json of {folder}: {part} must map modules to {kind}, got "
                    f"{str(said)[:40]!r} for {path[:80]}; copy the folder again"
                )
    return fields


def _are_sizes(said: Any) -> bool:
    """Tell whether something maps names to numbers, or to shapes of a few, or of null."""

    def is_size(value: Any) -> bool:
        if isinstance(value, list):
            numbers = [n for n in value if n is not None]
            few = numbers and len(value) < 5
            return bool(few) and all(isinstance(n, int) and is_size(n) for n in numbers)
        return isinstance(value, int | float) and abs(value) <= LARGEST

    return isinstance(said, Mapping) and all(map(is_size, said.values()))


def _is_head_input(said: Any) -> bool:
    """Tell whether something is ``[position, keyword, heads]``, or ``[..., output, table]``."""
    types = (int, str, (list, type(None)), int, str)
    if not isinstance(said, list) or len(said) not in (3, 5):
        return False
    if not all(isinstance(each, kind) for each, kind in zip(said, types, strict=False)):
        return False
    if said[2] is None:
        return len(said) == 5
    return all(isinstance(n, int) and 0 <= n <= LARGEST for n in said[2])


@contextmanager
def reading(what: Any, operation: str) -> Iterator[None]:
    """Turn whatever transformers raises at a damaged file, which is anything, into one line."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = "give a folder, a hub id or a GGUF file that transformers can load"
        if "trust_remote_code" in str(error):
            hint = (
                "it needs code of its own, which liar_ext doesn't run; take a model whose class is "
                "in transformers"
            )
        raise InputError(
            f"{operation}: can't load {what}: {type(error).__name__}: {one_line(error)}; {hint}"
        ) from error


def read_weights(
    stock: Any,
    found: Folder,
    operation: str,
    plan: Plan | None = None,
    *,
    strict: bool,
    **kwargs: Any,
) -> nn.Module:
    """Load a folder by its stock class; refuse weights that lack, or add, any of the model's."""
    is_packed = "quantization_config" in found.config
    numel = None if is_packed else sum(map(prod, found.tensors.values()))
    loader = _checked_class(stock, plan, numel, f"{operation}: {found.path}")
    with quiet(), reading(found.path, operation):
        # Weights of other sizes are refused below, by name.
        given = PLAINLY | kwargs | SAFELY | {"ignore_mismatched_sizes": True}
        if CLASS_NAME in found.config:  # whose loader runs no code, and calls the type otherwise
            del given["trust_remote_code"], given["use_kernels"]
            if (dtype := given.pop("dtype", "auto")) == "auto":
                with safe_open(min(found.path.glob("*.safetensors")), framework="pt") as file:
                    dtype = file.get_tensor(next(iter(file.keys()))).dtype
            given["torch_dtype"] = getattr(torch, str(dtype).removeprefix("torch."))
        model, info = loader.from_pretrained(found.path, **given)
    model.__class__ = stock  # only __init__ differed, and no module has that class
    if not strict and "add_pooling_layer" in inspect.signature(stock.__init__).parameters:
        # Many encoders' folders lack the pooler. A sentence encoder is read by its hidden states.
        pooler = {name for name in info["missing_keys"] if name.startswith("pooler.")}
        for name in pooler:
            model.get_parameter(name).data.zero_()
        info["missing_keys"] = set(info["missing_keys"]) - pooler
    check_keys(info, found.path, operation, strict)
    if hasattr(model.config, "liar"):
        said = _sizes_said(model.config)
        with reading(found.path, operation):
            describe(model)
        if said[0] and not _agree(said, _sizes_said(model.config)):
            raise InputError(
                f"{operation}: config.json of {found.path} contradicts itself: the sizes of its "
                "modules aren't those of its layers and heads; copy the folder again"
            )
    return settled(model)


def settled(model: nn.Module) -> nn.Module:
    """Return a model that can run: in float64 without the kernel for experts, which takes none."""
    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _sizes_said(config: Any) -> tuple[dict[tuple[str, str], tuple[int | None, ...]], list[Any]]:
    said = config.liar if isinstance(config.liar, Mapping) else {}
    shapes = {
        (path, name): tuple(size)
        for part in ("modules", "head")
        for path, sizes in said.get(part, {}).items()
        for name, size in sizes.items()
        if isinstance(size, list)
    }
    # Of a config that counts no layers, earlier folders have some.
    parts = filter(counts_layers, config_parts(config))
    spec = [part.__dict__.get("_heterogeneity_spec") for part in parts]
    return shapes, [each and each.per_layer_overrides for each in spec]


def _agree(one: tuple[dict, list], other: tuple[dict, list]) -> bool:
    """Tell whether what two configs say agrees; null, for a whole dimension, does with any size."""
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(
            len(size) == len(other[0][key])
            and all(n == m or None in (n, m) for n, m in zip(size, other[0][key], strict=True))
            for key, size in one[0].items()
        )
    )


def check_keys(info: Mapping[str, Any], path: Any, operation: str, strict: bool) -> None:
    """Refuse missing weights, and weights of layers that the model hasn't.

    A stranger's folder may hold a head that the class doesn't read (``strict=False``).
    """
    kinds = "mismatched", "missing", "unexpected"
    mismatched, missing, extra = (sorted(info[f"{kind}_keys"]) for kind in kinds)
    if not strict:
        extra = [key for key in extra if re.search(r"\.\d+\..*(weight|bias)$", key)]

    def some(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    wrong = ""
    if mismatched:
        name, theirs, ours = mismatched[0]
        wrong = (
            f"has {name} with shape {tuple(theirs)}, its config or plan says {tuple(ours)} "
            f"({len(mismatched)} such weights)"
        )
    elif missing:
        wrong = f"lacks {some(missing)}"
    elif extra:
        wrong = f"has weights that its config, or plan, doesn't: {some(extra)}"
    if wrong:
        raise InputError(f"{operation}: {path} {wrong}; copy it again")


def stock_class(fields: Mapping[str, Any], operation: str) -> Any:
    """Return the class of transformers that a config names, if it is one for that type of model."""
    import transformers

    if CLASS_NAME in fields:
        name = str(fields[CLASS_NAME])[:80]
        if (stock := model_class(name)) is None:
            raise InputError(
                f"{operation}: config.json names {name!r} of diffusers, which isn't installed, or "
                "none of the families; pip install diffusers, or see docs/howto/diffusion.md"
            )
        return stock
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    with reading(name, operation):
        stock = model_class(name) if isinstance(name, str) else None
    if stock is None:
        raise InputError(
            f"{operation}: transformers {transformers.__version__} has no model class "
            f"{str(name)[:80]!r}, which config.json must name in architectures; update "
            "transformers, or take a model that needs no code of its own"
        )
    expected = getattr(stock.config_class, "model_type", None)
    if fields.get("model_type") != expected:
        raise InputError(
            f"{operation}: {name} is of type {expected!r}, config.json says "
            f"{str(fields.get('model_type'))[:80]!r}; copy the folder again"
        )
    return stock


def bare_class(found: Folder, stock: Any) -> Any | None:
    """Return the class without a head, if the weights are those of it; None otherwise.

    Folders of sentence-transformers, with ``modules.json``, have such weights whatever head their
    config names. In any other folder the weights decide: none of the head's own is there, and none
    that the bare model lacks, as a head has in older files.
    """
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    bare = MODEL_MAPPING.get(stock.config_class, None)
    if bare is stock or not isinstance(bare, type):
        return None
    if (found.path / MODULES_FILE).is_file():
        return bare
    with reading(found.path, "load_model"):
        # Of the file, in which transformers writes an infinite number in a way of its own.
        config = CONFIG_MAPPING[found.config["model_type"]].from_pretrained(found.path)
        model, without = (skeleton(each, config) for each in (stock, bare))
    prefix, tied = f"{stock.base_model_prefix}.", set(model.all_tied_weights_keys)
    head = {name for name in model.state_dict() if not name.startswith(prefix)} - tied
    there = {name.removeprefix(prefix) for name in found.tensors}
    more = {name for name in there - set(without.state_dict()) if "position_ids" not in name}
    return bare if head and head.isdisjoint(there) and not more else None


def _checked_class(stock: Any, plan: Plan | None, numel: int | None, what: str) -> Any:
    """Return a class that builds the stock model, with the sizes of its config or of a plan.

    It is built on the meta device. If it wants far more than the files hold, tied weights counted
    once, no memory is taken. By the name of the stock class transformers finds how to rename the
    weights of older checkpoints.
    """
    said = hasattr(stock, "register_to_config")  # of diffusers: its fields are arguments
    base = pruned_class(stock) if said else stock

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        resize(self)
        if plan is not None:
            apply_plan(self, plan)
        tied = getattr(self, "all_tied_weights_keys", {})  # none of diffusers
        claimed = sum(each.numel() for name, each in self.named_parameters() if name not in tied)
        if numel is not None and claimed > 2 * numel:
            raise InputError(
                f"{what} has {numel:,} numbers in its weights, and its config claims {claimed:,}; "
                "copy the folder again"
            )

    if said:
        build.__signature__ = inspect.signature(base.__init__)
    return type(stock.__name__, (base,), {"__init__": build, "__module__": stock.__module__})
