"""The rows of the report on sites that were solved."""

from __future__ import annotations

from liar_ext.models.sites import Site
from liar_ext.reconstruction.ridge import Solution
from liar_ext.rows import SiteRow


def report_row(
    site: Site,
    units: int,
    dropped_rows: int,
    solution: Solution,
    seconds: float,
    target: str = "dense-input",
) -> SiteRow:
    """Return the row of the report on a site that keeps ``units`` units."""
    return SiteRow(
        name=site.name,
        units_before=site.units,
        units_after=units,
        params_before=site.params,
        params_after=units * site.unit_params,
        damp=solution.damp,
        error=solution.error,
        holdout_error=solution.holdout_error,
        condition=solution.condition,
        dropped_rows=dropped_rows,
        path=solution.path,
        seconds=seconds,
        target=target,
        share=solution.step_size,
    )
