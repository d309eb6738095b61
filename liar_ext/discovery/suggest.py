"""Propose a row of the table of families for a model that it lacks, and prove it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liar_ext.discovery.instance import Refused
from liar_ext.discovery.propose import propose
from liar_ext.discovery.rows import code
from liar_ext.discovery.shrinking import check_sizes
from liar_ext.errors import InputError, one_line
from liar_ext.models.family import Family
from liar_ext.models.registry import FAMILIES


@dataclass(frozen=True)
class Suggestion:
    """A row of the table of families, and what stands behind it.

    Parameters
    ----------
    family : Family
        The row.
    known : bool
        Whether the table has it already; nothing was tried then.
    proved : tuple of str
        What was proved of it, each a sentence.
    notes : tuple of str
        What else is to be known, such as what was left alone.

    What the row lacks, and why, is in ``family.without``.
    """

    family: Family
    known: bool
    proved: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """Python code that registers the row."""
        return code(self.family)


@torch.no_grad()
def suggest_family(model: Any) -> Suggestion:
    """Propose a row of the table of families for a model or its config, and prove it.

    A tiny instance of the class is built from the config with its sizes made small; the blocks,
    the linear layers in them and who reads whom are found by moving single outputs in one pass.
    Then the row is registered for a moment, and the instance pruned by it in every combination:
    slicing must equal zeroing, and saved folders must load. What can't be proved isn't in the row.

    Parameters
    ----------
    model : transformers.PreTrainedModel or PreTrainedConfig
        A model, whose weights aren't read; or a config, from which the class is built that it
        names in ``architectures``, or the base model.

    Returns
    -------
    Suggestion
        Its ``code`` registers the row. A family of the table comes back as it is.

    Raises
    ------
    InputError
        If neither attention nor MLP can be described, with the reason.

    Examples
    --------
    >>> import liar_ext
    >>> print(liar_ext.suggest_family(model).code)  # doctest: +SKIP
    """
    given = model if isinstance(model, nn.Module) else None
    config = getattr(model, "config", None) if given is not None else model
    name = getattr(config, "model_type", None)
    if not isinstance(name, str) or not name or not hasattr(config, "to_dict"):
        raise InputError(
            "suggest_family: takes a model of transformers or its config, with a model_type, got "
            f"{type(model).__name__}"
        )
    if name in FAMILIES:
        return Suggestion(FAMILIES[name], known=True)
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    showing = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        if wrong := check_sizes(config):
            raise Refused(wrong)
        with torch.device("cpu"):
            family, proved, notes = propose(_class_of(model), config, given)
    except Refused as error:
        raise InputError(
            f"suggest_family: no row for {name!r}: {one_line(error, 700)}; describe the family by "
            "hand, see docs/extend.md"
        ) from error
    finally:
        if showing:
            enable_progress_bar()
    return Suggestion(family, False, tuple(proved), tuple(notes))


def _class_of(model: Any) -> type[nn.Module]:
    """Return the class of a model, or the one that a config is for."""
    if isinstance(model, nn.Module):
        return type(model)
    import transformers

    names = getattr(model, "architectures", None) or [""]
    stock = getattr(transformers, str(names[0]), None)
    if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel):
        return stock
    mapping = transformers.AutoModel._model_mapping
    if type(model) in mapping:
        found = mapping[type(model)]
        return found[0] if isinstance(found, tuple | list) else found
    raise Refused(
        f"transformers {transformers.__version__} has no model class for {type(model).__name__}; "
        "build the model, and give that to liar_ext.suggest_family"
    )
