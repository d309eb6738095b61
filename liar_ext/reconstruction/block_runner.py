"""Run the blocks of a model one by one, on hidden states of the caller's choosing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liar_ext.calibration.hooks import Ended, replaced, watched
from liar_ext.errors import InputError
from liar_ext.models.reading import body_of
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
    sums: dict of str to Tensor
        What the norms of :attr:`Blocks.norms` read, by site name.
    """

    output: Tensor | None
    seen: dict[str, tuple[Tensor, Tensor]]
    sums: dict[str, Tensor] = field(default_factory=dict)


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

    Attributes
    ----------
    norms : dict of str to str
        Path of the norm that reads the sum of stream and consumer, by the name of those sites where
        :meth:`norm_of_sum` found one; runs note what it reads.
    """

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self._model = model
        self.norms: dict[str, str] = {}
        self._body = body_of(model)
        self.sites: dict[int, list[Site]] = {}
        for site in sites:
            self.sites.setdefault(site.block, []).append(site)
        self._blocks = [model.get_submodule(at[0].path) for at in self.sites.values()]
        self._forwards = [block.forward for block in self._blocks]
        self._beside: tuple | None = None  # what a block returns after its hidden states, as None
        self._wanted = 0
        self._answer: Callable[[], Tensor] | None = None  # gives what the last block would

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def beside(self) -> int | None:
        """How many values a block returns after its hidden states; None: it returns them alone.

        Known once :meth:`run` has run a block; a walk that goes on from elsewhere has to be told.
        """
        return None if self._beside is None else len(self._beside)

    @beside.setter
    def beside(self, count: int | None) -> None:
        self._beside = None if count is None else (None,) * count

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

    @contextmanager
    def answering(self, give: Callable[[], Tensor]) -> Iterator[None]:
        """Let the model's forward go on, after the last block, from what ``give`` gives.

        No block is run; :meth:`run` must have run one before, to know what blocks return.
        """
        before, self._wanted, self._answer = self._wanted, len(self), give
        try:
            yield
        finally:
            self._wanted, self._answer = before, None

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
            Site after whose consumer, or the norm that reads its sum, the run may end.
        """
        (_, *args), kwargs = self.enter(index, inputs)
        run = Run(None, {})
        with ExitStack() as stack:
            for site in self.sites[index]:
                consumer, norm = self._model.get_submodule(site.consumer), self.norms.get(site.name)
                if consumers and site.name in consumers:
                    stack.enter_context(replaced(consumer, consumers[site.name]))
                last = end if norm is None else None
                stack.enter_context(watched(consumer, _note(run.seen, site.name, last)))
                if norm is not None:
                    note = _note(run.sums, site.name, end, input_only=True)
                    stack.enter_context(watched(self._model.get_submodule(norm), note))
            try:
                output = self._forwards[index](hidden, *args, **kwargs)
            except Ended:
                return run
        self._beside = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        run.output = output if self._beside is None else output[0]
        return run

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

    def norm_of_sum(self, site: Site, inputs: Mapping[str, Tensor], hidden: Tensor) -> str | None:
        """Return the path of the norm that reads the stream plus the consumer's output, or None.

        BERT and its kin add first and normalise then. Judged by running the block on ``hidden``,
        to rounding: what the norm reads is what it reads with a silent consumer, plus what the
        consumer puts out. A norm that reads the consumer's output alone is none.
        """

        def silence(x: Tensor) -> Tensor:
            return hidden.new_zeros(*x.shape[:-1], site.d_out)

        run, read = self._norms_read(site, inputs, hidden, {})
        _, unmoved = self._norms_read(site, inputs, hidden, {site.name: silence})
        added = run.seen[site.name][1].view_as(hidden)
        for norm in read.keys() & unmoved.keys():
            both, quiet = read[norm], unmoved[norm]
            if both.numel() != added.numel() or torch.equal(both, quiet) or not quiet.any():
                continue
            both, quiet = both.view_as(added), quiet.view_as(added)
            tolerance = 4 * torch.finfo(added.dtype).eps * (both.abs() + quiet.abs() + added.abs())
            if not ((both - quiet - added).abs() > tolerance).any():
                return norm
        return None

    def _norms_read(
        self,
        site: Site,
        inputs: Mapping[str, Tensor],
        hidden: Tensor,
        consumers: Mapping[str, Forward],
    ) -> tuple[Run, dict[str, Tensor]]:
        """Run a block, and return with it what each of its norms reads, by path."""
        read: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, module in self._model.get_submodule(site.path).named_modules():
                if "norm" in type(module).__name__.lower():
                    note = _note(read, f"{site.path}.{name}", None, input_only=True)
                    stack.enter_context(watched(module, note))
            return self.run(site.block, inputs, hidden, consumers), read

    def _arrive(self, index: int) -> Callable:
        """Return the forward that stands in for a block: pass hidden states on, or stop there."""

        def forward(*args, **kwargs):
            if index == self._wanted:
                raise Ended(args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if self._answer is not None and index == len(self) - 1:
                hidden = self._answer()
            return hidden if self._beside is None else (hidden, *self._beside)

        return forward


@torch.no_grad()
def is_chain(model: nn.Module, sites: list[Site], inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether each block reads what the one before it wrote, and nothing comes between."""
    blocks = [model.get_submodule(path) for path in dict.fromkeys(site.path for site in sites)]
    read: list[Tensor] = []
    wrote: list[Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: tuple, output: object) -> None:
        wrote.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        body_of(model)(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(wrote[:-1], read[1:], strict=True)
    # Blocks may lie on several devices.
    return len(read) == len(blocks) and all(torch.equal(x.to(y.device), y) for x, y in pairs)


def _note(seen: dict, name: str, end: str | None, *, input_only: bool = False) -> Callable:
    """Return a callback that keeps a module's input, and output, and may end the run."""

    def note(args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = args[0] if input_only else (args[0], output)
        if name == end:
            raise Ended

    return note
