"""``liar merge``: the sum of moment banks."""

from __future__ import annotations

import argparse

from liar_ext.calibration.bank_file import read_bank
from liar_ext.calibration.moments import MomentBank
from liar_ext.cli.output import warn
from liar_ext.cli.with_bank import check_bank_place, save_bank
from liar_ext.errors import InputError


def run(options: argparse.Namespace) -> None:
    """Check what the banks say of themselves, add them, write."""
    if len(options.banks) < 2:
        raise InputError("merge: needs at least two banks to add, got one; name another")
    check_bank_place(options.out, "merge", "--out", options.overwrite)
    headers = {path: read_bank(path, sums=False) for path in options.banks}
    if len(headers) < len(options.banks):
        raise InputError("merge: one bank is named twice, which would count its text twice")
    # One order, whatever that of the arguments is: so the sum is the same to the last bit.
    order = sorted(headers, key=lambda path: (headers[path].source.get("data", []), path))
    checked = MomentBank(source=headers[order[0]].source)
    checked.sequences = headers[order[0]].sequences
    for path in order[1:]:
        header = headers[path]
        with _naming(path, order[: order.index(path)]):
            checked.merge(MomentBank(source=header.source, sequences=header.sequences))
    total = MomentBank.load(order[0])
    for path in order[1:]:
        with _naming(path, order[: order.index(path)]):
            total.merge(MomentBank.load(path))
    save_bank(total, options.out, "merge", "--out", options.overwrite)
    if not options.quiet:
        print(
            f"{options.out}: moments of {len(total)} sites over {total.source['tokens']:,} tokens "
            f"in {total.source['sequences']} sequences of {len(order)} banks"
        )
        bare = [path for path in order if headers[path].text is None]
        if bare:
            warn([f"The text is left out, since {', '.join(bare)} has none."])
        if any(header.source.get("sensitivities") for header in headers.values()):
            warn(["Sensitivities are left out: they were measured by the sums of one bank alone."])


class _naming:
    """Let an error of adding a bank say which one it is."""

    def __init__(self, path: str, done: list[str]) -> None:
        self.path, self.done = path, done

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and str(error).startswith("MomentBank.merge: "):
            why = str(error).removeprefix("MomentBank.merge: ")
            raise InputError(
                f"merge: {self.path} can't be added to {', '.join(self.done)}: {why}"
            ) from None
