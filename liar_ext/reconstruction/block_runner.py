"""Run the blocks of a model one by one, on hidden states of the caller's choosing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch
from liar_ext.calibration.taps import Ended, is_relative, relative_weights, replaced, watched
from liar_ext.models.family import HeadInput
from liar_ext.models.running import body_of, device_of
from liar_ext.models.sites import Site, teams_of
from liar_ext.models.whole import called_at, routed_input, routed_output, routed_weights
from liar_ext.reconstruction.ridge import Tokens
from liar_ext.system.errors import InputError

Forward = Callable[..., Tensor]


@dataclass
class Run:
    """What one run of a block gave."""

    before: Tensor  # the hidden states that it read
    output: Tensor | None = None  # those after it; None if the run ended at a consumer
    # Input and output of each consumer, by layer: the name of a site, or of all experts, whose
    # input is what the module of all of them is called with.
    seen: dict[str, tuple[Tensor | tuple, Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # what Blocks.norms read, by layer


class Blocks:
    """The blocks of a model, each to be run by itself with the arguments that the model gives it.

    Masks and positions are made anew for every run by the model's own code, which is run up to the
    block with all blocks before it switched off. Several stacks, such as an encoder and a decoder,
    are counted through in the order of computation.
    """

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self._model = model
        self.norms: dict[str, str] = {}  # by layer, from norm_of_sum; runs note what they read
        # By stack, of what a block returns after its hidden states: whether all blocks carry it on.
        self.beside: dict[str, list[bool]] = {}
        self._body = body_of(model)
        at: dict[str, list[Site]] = {}
        for site in sites:
            at.setdefault(site.path, []).append(site)
        self.layers: list[dict[str, list[Site]]] = [teams_of(here) for here in at.values()]
        self._stacks = [here[0].part for here in at.values()]  # by block
        self._paths = list(at)
        self._blocks = [model.get_submodule(path) for path in at]
        self._forwards = [block.forward for block in self._blocks]
        self._carried: object = None
        self._wanted = 0
        self._silent: int | None = None  # a block that puts out zeros, for what is added to them
        self._answers: Mapping[int, Callable[[], Tensor]] = {}  # what some blocks would give

    def __len__(self) -> int:
        return len(self._blocks)

    def index_of(self, site: Site) -> int:
        """Return the index of the block of a site."""
        return self._paths.index(site.path)

    def begins(self, index: int) -> bool:
        """Tell whether a block is the first of its stack."""
        return index == 0 or self._stacks[index].name != self._stacks[index - 1].name

    def read_later(self, index: int) -> bool:
        """Tell whether a stack after that of block ``index`` reads what comes out of the blocks."""
        own = self._stacks[index].name
        return any(each.cross_attn and each.name != own for each in self._stacks[index + 1 :])

    def device(self, index: int) -> torch.device:
        """Return where a block computes."""
        return device_of(self._blocks[index])

    @contextmanager
    def opened(self) -> Iterator[Blocks]:
        """Take the blocks over while the context is open."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(replaced(block, self._arrive(index)))
            yield self

    @contextmanager
    def answering(self, answers: Mapping[int, Callable[[], Tensor]]) -> Iterator[None]:
        """Let the model's forward go on from hidden states after blocks, one of each stack run."""
        before, self._wanted, self._answers = self._wanted, len(self), answers
        self._silent = None
        try:
            yield
        finally:
            self._wanted, self._answers = before, {}

    def enter(self, index: int, inputs: Mapping[str, Tensor]) -> tuple[tuple, dict]:
        """Return the arguments that block ``index`` gets for a batch, hidden states first.

        Where no stack begins these are what the model adds to the output of the block before:
        zeros, but for Qwen3-VL's features of images.
        """
        self._wanted, self._silent = index, None if self.begins(index) else index - 1
        try:
            self._body(**inputs)
        except Ended as ended:
            args, kwargs = ended.args
            if args:
                return args, kwargs
            kwargs = dict(kwargs)
            return (kwargs.pop("hidden_states"),), kwargs
        raise InputError(f"layerwise: {type(self._body).__name__} never calls its block {index}")

    def run(
        self,
        index: int,
        inputs: Mapping[str, Tensor],
        hidden: Tensor,
        consumers: Mapping[str, Forward] | None = None,
        end: str | None = None,
    ) -> Run:
        """Run one block on a batch after the ``hidden`` states that the block before gave.

        ``consumers`` say what to compute in place of a consumer, or of all experts, by layer. The
        run may end after the consumer of the layer ``end``, or the norm that reads its sum.
        """
        (added, *args), kwargs = self.enter(index, inputs)
        run = Run(hidden if self.begins(index) else hidden + added.to(hidden))
        made: dict[str, Tensor] = {}
        with ExitStack() as stack:

            def watch(path: str, note: Callable) -> None:
                stack.enter_context(watched(self._model.get_submodule(path), note))

            if (maker := self._maker(index)) is not None:
                path = f"{self._paths[index]}.{maker.module}"
                watch(path, _note(made, "table", lambda _, output: output[maker.output]))
            for name, layer in self.layers[index].items():
                path, norm = called_at(layer[0]), self.norms.get(name)
                if consumers and name in consumers:
                    consumer = self._model.get_submodule(path)
                    stack.enter_context(replaced(consumer, consumers[name]))
                keep, ends = partial(_called, layer[0]), name == end
                watch(path, _note(run.seen, name, keep, ends=ends and norm is None))
                if norm is not None:
                    watch(norm, _note(run.sums, name, _read, ends=ends))
            try:
                output = self._forwards[index](run.before, *args, **kwargs)
            except Ended:
                return run
        if isinstance(output, tuple):
            carried = made.get("table")
            beside = [carried is not None and each is carried for each in output[1:]]
            self.beside.setdefault(self._stacks[index].name, beside)
        run.output = _hidden_of(output)
        return run

    def adds_plainly(self, site: Site, inputs: Mapping[str, Tensor], hidden: Tensor) -> bool:
        """Tell whether the block adds the consumer's output to the stream as it is, to rounding.

        With all later consumers silent, the stream after it is the one before plus what attention
        up to this one put out; an MLP's consumer adds its own to what there is without.
        """
        index = self.index_of(site)
        order = list(self.layers[index])

        def run_without(names: Sequence[str]) -> Run:
            return self.run(index, inputs, hidden, dict.fromkeys(names, _silence(site)))

        if site.kind == "attn":
            run = run_without(order[order.index(site.team) + 1 :])
            before = self.after_attention(site, run.before, run, itself=False)
        else:
            before, run = run_without([site.team]).output, self.run(index, inputs, hidden)
        added = run.seen[site.team][1].view_as(hidden)
        return _is_sum(run.output, before, added, hidden)

    def after_attention(
        self, site: Site, hidden: Tensor, run: Run, *, itself: bool = True
    ) -> Tensor:
        """Return the stream after an attention site, or before it, of a block that adds plainly."""
        for name, layer in self.layers[self.index_of(site)].items():
            if name == site.team and not itself:
                break
            if layer[0].kind == "attn":
                hidden = hidden + run.seen[name][1].to(hidden).view_as(hidden)
            if name == site.team:
                break
        return hidden

    def norm_of_sum(
        self, site: Site, inputs: Mapping[str, Tensor], hidden: Tensor
    ) -> tuple[str | None, bool]:
        """Return the path of the norm that reads the stream plus the consumer's output, or None.

        As in BERT: it reads what it does with a silent consumer, plus what the consumer puts out.
        Also tells whether the block gives what that norm does, bit for bit.
        """
        run, read = self._norms_read(site, inputs, hidden)
        _, unmoved = self._norms_read(site, inputs, hidden, {site.team: _silence(site)})
        added = run.seen[site.team][1].view_as(hidden)
        for norm in read.keys() & unmoved.keys():
            both, quiet = read[norm], unmoved[norm]
            if both.numel() != added.numel() or torch.equal(both, quiet) or not quiet.any():
                continue
            if _is_sum(both.view_as(added), quiet.view_as(added), added):
                return norm, torch.equal(self._model.get_submodule(norm)(both), run.output)
        return None, False

    def _norms_read(
        self,
        site: Site,
        inputs: Mapping[str, Tensor],
        hidden: Tensor,
        consumers: Mapping[str, Forward] | None = None,
    ) -> tuple[Run, dict[str, Tensor]]:
        read: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, module in self._model.get_submodule(site.path).named_modules():
                if "norm" in type(module).__name__.lower():
                    stack.enter_context(watched(module, _note(read, f"{site.path}.{name}", _read)))
            return self.run(self.index_of(site), inputs, hidden, consumers), read

    def _arrive(self, index: int) -> Callable:
        """Return a stand-in for a block's forward: pass hidden states on, or stop there."""

        def forward(*args, **kwargs):
            if index == self._wanted:
                raise Ended(args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if index in self._answers:
                hidden = self._answers[index]().to(hidden.device)
            elif index == self._silent:
                hidden = torch.zeros_like(hidden)
            beside = self.beside.get(self._stacks[index].name)
            if beside is None:
                return hidden
            if any(beside) and self._maker(index) is not None:
                self._carried = self._made(index, args, kwargs)
            return (hidden, *(self._carried if carries else None for carries in beside))

        return forward

    def _maker(self, index: int) -> HeadInput | None:
        """Return what makes something in a block for itself and all blocks after it."""
        inputs = (layer[0].wiring.head_input for layer in self.layers[index].values())
        made = (each for each in inputs if each and each.table and each.output is not None)
        return next(made, None) if self.begins(index) else None

    def _made(self, index: int, args: tuple, kwargs: dict) -> Tensor:
        """Run a block as far as to what it makes for all blocks after it, and return that."""
        maker, made = self._maker(index), {}
        note = _note(made, "table", lambda _, output: output[maker.output], ends=True)
        with watched(self._blocks[index].get_submodule(maker.module), note), suppress(Ended):
            self._forwards[index](*args, **kwargs)
        return made["table"]


@torch.no_grad()
def is_chain(model: nn.Module, sites: list[Site], inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether each block reads what the one before in its stack wrote, and of no other."""
    alone = Blocks(model, sites)
    read: list[Tensor] = []
    wrote: list[Tensor] = []

    def run(index: int, *args: object, **kwargs: object) -> object:
        read.append(args[0] if args else kwargs["hidden_states"])
        output = alone._forwards[index](*args, **kwargs)
        wrote.append(_hidden_of(output))
        if isinstance(output, tuple):
            alone.beside[alone._stacks[index].name] = [False] * (len(output) - 1)
        return output

    with ExitStack() as stack:
        for index, block in enumerate(alone._blocks):
            stack.enter_context(replaced(block, partial(run, index)))
        alone._body(**inputs)
    if len(read) != len(alone):
        return False
    with alone.opened():
        for index in range(1, len(alone)):
            here, before = read[index], wrote[index - 1].to(read[index].device)
            if alone.begins(index) or torch.equal(before, here):
                continue
            added = alone.enter(index, inputs)[0][0].to(here.device)
            if added.shape != before.shape or not torch.equal(before + added, here):
                return False
    return True


def _hidden_of(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _read(args: tuple, _: object) -> Tensor:
    return args[0]


def _silence(site: Site) -> Forward:
    """Return what takes the place of a consumer and puts out zeros."""
    return lambda x, *_: x.new_zeros(*x.shape[:-1], site.d_out)


def _is_sum(total: Tensor, one: Tensor, other: Tensor, *terms: Tensor) -> bool:
    """Tell whether a total is that of two, to the rounding of the largest terms of each token."""
    size = sum(each.abs() for each in (total, one, other, *terms)).amax(-1, keepdim=True)
    tolerance = 4 * torch.finfo(total.dtype).eps * size
    return not bool(((total - one - other).abs() > tolerance).any())


def _called(site: Site, args: tuple, output: Tensor) -> tuple[Tensor | tuple, Tensor]:
    """Return what a consumer, or the module of all experts, reads, and what it gives."""
    if site.expert is None:
        return args[0], output.clone()  # Falcon and Llama 4 add to it in place
    return args[:3], routed_output(site, output)


def _note(seen: dict, name: str, keep: Callable, *, ends: bool = False) -> Callable:
    """Return a callback that keeps something of a module's run, and may end it."""

    def note(args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = keep(args, output)
        if ends:
            raise Ended

    return note


def rows_of(
    model: nn.Module,
    layer: Sequence[Site],
    read: Tensor | tuple[Tensor, ...],
    residual: Tensor,
    used: Tensor,
) -> Iterator[Tokens]:
    """Yield the rows of each site of a layer, from what a :class:`Run` has seen it ``read``.

    The ``residual`` of the layer's output is asked of all experts alike. ``used`` is what each row
    counts, see :func:`counted`.
    """
    if layer[0].expert is None:
        yield read.flatten(0, -2), residual, used
        return
    residual = residual / routed_weights(layer[0], read).sum(-1, keepdim=True).to(residual)
    for site in layer:
        routed = routed_input(model, site, read)
        counts = used[routed.token]
        here = counts > 0
        asked = residual[routed.token][here]
        yield routed.x[here], asked, routed.weight[here].double().square() * counts[here]


def counted(
    batch: Batch, site: Site, tokens: int, output: Tensor, total: Tensor | None = None
) -> Tensor:
    """Return what each of ``tokens`` rows counts: 0 for padding, and 1 unless a norm follows.

    That divides by the size of what it reads, the ``output`` or the ``total`` of it and the stream.
    """
    used = batch.counting(tokens, output.device, site.part.mask)
    used = batch.weighing(used.view(len(batch), -1)).flatten()
    if total is not None:
        return used * relative_weights(total.flatten(0, -2), centred=True)
    return used * relative_weights(output.flatten(0, -2)) if is_relative(site) else used


def layer_forward(model: nn.Module, layer: Sequence[Site], new: Mapping[str, Forward]) -> Forward:
    """Return what takes the place of a layer's consumer, or of the module of all experts."""
    if layer[0].expert is None:
        return new[layer[0].name]

    def experts(*args: Tensor) -> Tensor:
        # Where there are rows for each expert, the first has them all: the layer adds them up.
        total = torch.zeros_like(args[0])
        for site in layer:
            routed = routed_input(model, site, args)
            given = new[site.name](routed.x) * routed.weight[:, None]
            total.index_add_(0, routed.token, given.to(total.dtype))
        return total

    return experts
