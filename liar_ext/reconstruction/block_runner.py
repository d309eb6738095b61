"""Run the blocks of a model one by one, on hidden states of the caller's choosing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.calibration.hooks import Ended, replaced, watched
from liar_ext.errors import InputError
from liar_ext.models.running import device_of
from liar_ext.models.sites import Site

Forward = Callable[..., Tensor]


@dataclass
class Run:
    """What one run of a block gave.

    Parameters
    ----------
    output : Tensor or None
        Hidden states after the block; None if the run ended at a consumer.
    seen : dict of str to (Tensor, Tensor)
        Input and output of each consumer, by site name.
    """

    output: Tensor | None
    seen: dict[str, tuple[Tensor, Tensor]]


class Blocks:
    """The blocks of a model, each to be run by itself with the arguments that the model gives it.

    Masks and positions are made anew for every run by the model's own code: it is run up to the
    block with all blocks before it switched off. So nothing but hidden states has to be stored,
    and a model whose layers get different masks needs no special case.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, in evaluation mode.
    sites : sequence of Site
        All its sites.
    """

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self._model = model
        self._body = getattr(model, "base_model", model)
        self.sites: dict[int, list[Site]] = {}
        for site in sites:
            self.sites.setdefault(site.block, []).append(site)
        self._blocks = [model.get_submodule(at[0].path) for at in self.sites.values()]
        self._forwards = [block.forward for block in self._blocks]
        self._tuples = False  # whether a block returns its hidden states in a tuple
        self._wanted = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def device(self, index: int) -> torch.device:
        """Return where a block computes; blocks may be spread over several devices."""
        return device_of(self._blocks[index])

    @contextmanager
    def opened(self) -> Iterator[Blocks]:
        """Take the blocks over; outside of the context the model runs as ever."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(replaced(block, self._arrive(index)))
            yield self

    def enter(self, index: int, inputs: Mapping[str, Tensor]) -> tuple[tuple, dict]:
        """Return the arguments that block ``index`` gets for a batch, hidden states first.

        Hidden states are those of the dense model at block 0, and meaningless further on.
        """
        self._wanted = index
        try:
            self._body(**inputs)
        except Ended as ended:
            args, kwargs = ended.args
            if not args:
                kwargs = dict(kwargs)
                args = (kwargs.pop("hidden_states"),)
            return args, kwargs
        raise InputError(f"layerwise: {type(self._body).__name__} never calls its block {index}")

    def run(
        self,
        index: int,
        inputs: Mapping[str, Tensor],
        hidden: Tensor,
        consumers: Mapping[str, Forward] | None = None,
        end: str | None = None,
    ) -> Run:
        """Run one block.

        Parameters
        ----------
        index : int
            The block.
        inputs : mapping of str to Tensor
            The batch, as the model takes it.
        hidden : Tensor
            Hidden states before the block, (batch, tokens, hidden).
        consumers : mapping of str to callable, optional
            What to compute in place of a consumer, by site name.
        end : str, optional
            Site after whose consumer the run may end.
        """
        (_, *args), kwargs = self.enter(index, inputs)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for site in self.sites[index]:
                consumer = self._model.get_submodule(site.consumer)
                if consumers and site.name in consumers:
                    stack.enter_context(replaced(consumer, consumers[site.name]))
                stack.enter_context(watched(consumer, _note(seen, site.name, end)))
            try:
                output = self._forwards[index](hidden, *args, **kwargs)
            except Ended:
                return Run(None, seen)
        self._tuples = isinstance(output, tuple)
        return Run(output[0] if self._tuples else output, seen)

    def adds_plainly(self, site: Site, inputs: Mapping[str, Tensor], hidden: Tensor) -> bool:
        """Tell whether the block adds the consumer's output to the stream as it is.

        Judged by running the block on ``hidden``, to rounding: with the MLP silent, the stream
        after the block is the one before it plus what attention's consumer puts out; the MLP's
        consumer adds its own to that. A norm or a scale in between shows.
        """

        def silence(x: Tensor) -> Tensor:
            return hidden.new_zeros(*x.shape[:-1], hidden.shape[-1])

        mlp = {other.name: silence for other in self.sites[site.block] if other.kind == "mlp"}
        quiet = self.run(site.block, inputs, hidden, mlp)
        if site.kind == "attn":
            before, run = hidden, quiet
        else:
            before, run = quiet.output, self.run(site.block, inputs, hidden)
        added = run.seen[site.name][1].view_as(hidden)
        terms = hidden.abs() + before.abs() + added.abs() + run.output.abs()
        tolerance = 4 * torch.finfo(hidden.dtype).eps * terms
        return not bool(((run.output - before - added).abs() > tolerance).any())

    def _arrive(self, index: int) -> Callable:
        """Return the forward that stands in for a block: pass hidden states on, or stop there."""

        def forward(*args, **kwargs):
            if index == self._wanted:
                raise Ended(args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self._tuples else hidden

        return forward


def _note(seen: dict[str, tuple[Tensor, Tensor]], name: str, end: str | None) -> Callable:
    """Return a callback that keeps a consumer's input and output, and may end the run."""

    def note(args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (args[0], output)
        if name == end:
            raise Ended

    return note
