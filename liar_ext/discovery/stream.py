"""Find the steps of the residual stream: what writes it, normalises it and reads it, in order.

One pass tells who reads what: a layer reads the stream where it gets, to the last bit, what a norm
put out. In a block, what is moved with all linear layers held tells who writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import groupby

import torch
from torch import Tensor, nn

from liar_ext.discovery.blocks import Call, cloned, first_tensor, watch
from liar_ext.discovery.instance import Instance, Refused, outputs
from liar_ext.discovery.places import Place, Sources, offset_of, place_of, reads_features_of
from liar_ext.discovery.rows import registered
from liar_ext.discovery.tracing import Trace
from liar_ext.discovery.watching import fed_by
from liar_ext.models.family import Family, Step, Stream
from liar_ext.models.reading import base_path, blocks_of
from liar_ext.models.sites import sites

Doing = tuple[str, str]  # what is done, and the path of who does it


def find_stream(instance: Instance, family: Family) -> Stream:
    """Return the steps of the residual stream of an instance, without config fields.

    Raises
    ------
    Refused
        If something reads or writes it that a row can't name.
    """
    with registered(family):
        hidden = sites(instance.model)[0].d_out
        blocks = list(blocks_of(instance.model, family))
    return _Finder(instance, blocks, hidden).stream()


class _Finder:
    """Walks through what a pass ran, in order."""

    def __init__(self, instance: Instance, blocks: list[tuple[str, nn.Module]], hidden: int):
        self.instance, self.blocks, self.hidden = instance, blocks, hidden
        self.base = base_path(instance.model)
        self.sources, self.offsets = Sources(), set[float]()
        paths = {module: path for path, module in instance.model.named_modules()}
        self.calls = [(paths[call.module], call) for call in watch(instance)]

    def stream(self) -> Stream:
        first = next(i for i, (path, _) in enumerate(self.calls) if path == self.blocks[0][0])
        last = next(i for i, (path, _) in enumerate(self.calls) if path == self.blocks[-1][0])
        prefixes = tuple(f"{path}." for path, _ in self.blocks)
        outside = [i for i, (path, _) in enumerate(self.calls) if not path.startswith(prefixes)]
        start = self._start(self._places(self.calls[i] for i in outside if i < first))
        steps = [self._block(path) for path, _ in self.blocks]
        # Where there is no norm yet, what reads one in other blocks reads the stream as it is.
        later = [doing for block in steps[1:] for doing in block if doing[0] == "read"]
        steps[0] = [("read", p) if ("read", p) in later else (does, p) for does, p in steps[0]]
        self.stream_at = next(reversed(self.sources.outputs), "")
        ends = self._ends(self._places(self.calls[i] for i in outside if i > last))
        if len(self.offsets) > 1:
            raise Refused("some norms add one to their weights, some don't")
        return Stream(
            start=_steps(start),
            block=_steps(_merged(steps)),
            ends=tuple(_steps(chain) for chain in ends),
            config={},
            multiple_of=None,
            norm_offset=max(self.offsets, default=0.0),
            scaled=self._is_scaled(),
        )

    def _is_scaled(self) -> bool:
        """Tell whether the embeddings multiply by the root of the hidden size, and keep it."""
        table = self.instance.model.get_input_embeddings()
        return getattr(table, "scalar_embed_scale", None) == self.hidden**0.5

    def _places(self, calls: Iterable[tuple[str, Call]]) -> list[Place]:
        """Return what has to do with the stream, in order; tables may be looked up repeatedly."""
        found: dict[str, Place] = {}
        for path, call in calls:
            place = place_of(path, call, self.hidden)
            if place is not None and path in found and place.kind in ("norm", "linear"):
                raise Refused(f"{path} runs several times in a pass")
            if place is not None:
                found.setdefault(path, place)
        return list(found.values())

    def _norm(self, place: Place, path: str) -> Doing:
        """Note what a norm has put out."""
        self.offsets |= {offset_of(place)} - {None}
        self.sources.outputs[path] = place.call.output
        return "norm", place.path

    def _source(self, place: Place) -> tuple[str, bool] | None:
        """Return the norm whose output a layer reads, and whether of the first token only."""
        return self.sources.of(place.input)

    def _start(self, places: list[Place]) -> list[Doing]:
        """Return what is done before the blocks; paths in the base model."""
        done: list[Doing] = []
        for place in places:
            path = self._inside(place.path)
            if place.kind == "norm":
                done.append(("norm", self._norm(place, place.path)[1].removeprefix(self.base)))
            elif place.kind == "parameters":
                done += [("write", _join(path, name)) for name in place.parameters]
            elif place.kind == "table" or place.shape[0] != self.hidden:
                done.append(("write", path))
            else:
                raise Refused(f"{place.path} reads the embeddings before the blocks do")
        if all(does != "write" for does, _ in done):
            raise Refused(f"nothing before the blocks writes its {self.hidden} features")
        return done

    def _inside(self, path: str) -> str:
        if not path.startswith(self.base):
            raise Refused(f"{path} writes the stream outside of the base model")
        return path.removeprefix(self.base)

    def _block(self, path: str) -> list[Doing]:
        """Return what is done in a block; paths in the block."""
        call = next(call for at, call in self.calls if at == path)
        inside = [
            (at.removeprefix(f"{path}."), each)
            for at, each in self.calls
            if at.startswith(f"{path}.")
        ]
        trace, places = Trace(call), self._places(inside)
        writers = trace.writers()
        norms = [place.path for place in places if place.kind == "norm"]
        over_stream = fed_by(trace, norms, None)
        over_branch = set().union(*(fed_by(trace, norms, writer) for writer in writers))
        known = {place.path for place in places}
        for name in (*trace.readers, *writers):
            if name not in known:
                what = "reads" if name in trace.readers else "writes"
                raise Refused(f"{path}.{name} {what} the stream, and has not as many features")
        done: list[tuple[Doing, str]] = []  # with the norm, or who reads the same, that is read
        taken: list[Place] = []
        for place in places:
            if place.kind == "norm" and place.path in over_stream:
                done.append((self._norm(place, f"{path}.{place.path}"), ""))
            elif place.kind == "norm":
                branch = place.path in over_branch
                self.offsets |= {offset_of(place)} - {None} if branch else set()
                done.append((("branch_norm" if branch else "aside", place.path), ""))
            elif place.kind == "parameters":
                done += [(("write", _join(place.path, n)), "") for n in place.parameters]
            if place.path in trace.readers:
                source = self._source(place)
                if source is not None and not source[1]:
                    done.append((("read", place.path), source[0]))
                elif trace.reads_features(place.path):
                    alike = [each for each in taken if torch.equal(each.input, place.input)]
                    taken.append(place)
                    done.append((("take", place.path), (*alike, place)[0].path))
                else:
                    raise Refused(
                        f"{path}.{place.path} reads neither what a norm put out nor the stream "
                        "feature by feature"
                    )
            if place.path in writers:
                if place.shape[1] != self.hidden:
                    raise Refused(f"{path}.{place.path} writes no features, but numbers for them")
                done.append((("write", place.path), ""))
        return _after_their_norms(done, f"{path}.")

    def _ends(self, places: list[Place]) -> list[list[Doing]]:
        """Return the chains of what is done after the blocks."""
        stream = first_tensor(self._call_of(self.blocks[-1][0]).output)
        chains: list[list[Doing]] = []
        at: list[str] = []  # the norm that a chain has come to
        written: list[Place | None] = []  # what was written since

        def begin(norm: str) -> int:
            chains.append([])
            at.append(norm)
            written.append(None)
            return len(chains) - 1

        for place in places:
            path = place.path.removeprefix(self.base)
            if place.kind == "norm":
                if torch.equal(place.input, stream):
                    chain = begin(place.path)
                else:
                    chain = self._fed(place, written)
                chains[chain].append(("norm", self._norm(place, place.path)[1]))
                at[chain], written[chain] = place.path, None
            elif place.kind != "linear" or place.shape[0] != self.hidden:
                raise Refused(f"{place.path} has features of the stream after the blocks")
            else:
                source = self._source(place)
                if source is None and Sources({"": stream}).of(place.input) is not None:
                    chain, does = begin(""), "take"
                elif source is None:
                    chain, does = self._fed(place, written), "take"
                else:
                    does = "read_first" if source[1] else "read"
                    chain = next((i for i, norm in enumerate(at) if norm == source[0]), -1)
                    if source[0] == self.stream_at and (chain < 0 or written[chain] is not None):
                        chain = begin(self.stream_at)
                    if chain < 0:
                        raise Refused(f"{place.path} reads what {source[0]} put out, again")
                chains[chain].append((does, path))
                if place.shape[1] == self.hidden:
                    chains[chain].append(("write", path))
                    written[chain] = place
        return [[(does, p.removeprefix(self.base)) for does, p in chain] for chain in chains]

    def _fed(self, place: Place, written: list[Place | None]) -> int:
        """Return the chain whose last layer a norm or layer reads, feature by feature."""
        for chain, writer in reversed(list(enumerate(written))):
            if writer is not None and reads_features_of(place, writer, self._rerun(place)):
                return chain
        raise Refused(f"{place.path} reads something else than the stream or what a norm put out")

    def _rerun(self, reader: Place):
        """Return what runs the model with a layer's output moved, and gives what a reader gets."""

        def run(module: nn.Module, move: Tensor) -> Tensor:
            seen: list[Tensor] = []
            hooks = [
                module.register_forward_hook(lambda _, args, output: output + move),
                reader.call.module.register_forward_pre_hook(
                    lambda _, args, kwargs: seen.append(cloned(first_tensor((args, kwargs)))),
                    with_kwargs=True,
                ),
            ]
            try:
                outputs(self.instance.model, self.instance.inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            return seen[-1]

        return run

    def _call_of(self, path: str) -> Call:
        return next(call for at, call in self.calls if at == path)


def _after_their_norms(done: list[tuple[Doing, str]], prefix: str) -> list[Doing]:
    """Put each reader behind the norm that it reads, and those of norms outside first.

    Readers of one place of the stream itself come together.
    """
    here = {f"{prefix}{path}" for (does, path), _ in done if does == "norm"}
    ordered = [doing for doing, norm in done if doing[0] == "read" and norm not in here]
    for (does, path), at in (each for each in done if each[0][0] != "read"):
        if does == "take":
            ordered += [d for d, first in done if d[0] == "take" and first == at == path]
            continue
        ordered.append((does, path))
        if does == "norm":
            ordered += [d for d, norm in done if d[0] == "read" and norm == f"{prefix}{path}"]
    return ordered


def _merged(blocks: list[list[Doing]]) -> list[Doing]:
    """Return the steps of all blocks in one order; those that some lack are done ``_if`` there."""
    whole = blocks[0]
    for block in blocks[1:]:
        both: list[Doing] = []
        for _, a, b, c, d in SequenceMatcher(None, whole, block, autojunk=False).get_opcodes():
            both += whole[a:b] + [doing for doing in block[c:d] if doing not in whole[a:b]]
        whole = both
    if len(set(whole)) < len(whole):
        raise Refused("blocks read and write the stream in orders that differ")
    return [
        (does if all((does, path) in block for block in blocks) else f"{does}_if", path)
        for does, path in whole
    ]


def _steps(done: list[Doing]) -> tuple[Step, ...]:
    """Return steps, with what is done by several layers at once in one."""
    found = []
    for does, group in groupby(done, key=lambda doing: doing[0]):
        paths = tuple(path for _, path in group)
        alone = does.startswith("norm")
        found += [Step(does, (path,)) for path in paths] if alone else [Step(does, paths)]
    return tuple(found)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
