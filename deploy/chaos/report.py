"""What came out of a run, as it is told at its end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from deploy.chaos.faults import Recovery
from deploy.chaos.plan import ChaosConfig
from deploy.chaos.verify import Undisturbed

TOLD_MAX = 10
CLAIM = {
    "exactly_once": "each forecast and dead letter once, and all as in an undisturbed run; so are all final states",
    "at_least_once": "no forecast or dead letter is missing, all are as in an undisturbed run; so are all final states",
}


@dataclass(frozen=True)
class Outcome:
    """What came out. restarts: how many, by what came before. records, aborted: of the input, seen and never seen.

    differences: from the undisturbed run; failures: what ought not to have happened, whatever came of it.
    """

    config: ChaosConfig
    recoveries: Sequence[Recovery]
    restarts: Mapping[str, int]
    records: int
    aborted: int
    wanted: Undisturbed
    differences: Sequence[str]
    failures: Sequence[str]

    @property
    def equal(self) -> bool:
        """Whether it was as if nothing had happened."""
        return not self.differences and not self.failures


def tell(outcome: Outcome, console: Console) -> None:
    """Tables of faults and of what came out; then the verdict."""
    console.print(_faults(outcome))
    wanted = outcome.wanted
    restarts = ", ".join(f"{count} after {what}" for what, count in outcome.restarts.items()) or "none"
    console.print(
        f"restarts      {restarts}\n"
        f"input         {outcome.records:,} records; {outcome.aborted:,} more were aborted\n"
        f"forecasts     {sum(map(len, wanted.forecasts.values())):,} of {len(wanted.forecasts):,} streams\n"
        f"dead letters  {sum(wanted.letters.values()):,}, for {len({x.reason for x in wanted.letters})} reasons\n"
        f"final states  {len(wanted.states):,} alive, {len(wanted.ended):,} ended"
    )
    for what, lines in (("differences", outcome.differences), ("failures", outcome.failures)):
        console.print(listed(what, lines), markup=False, end="")
    if outcome.equal:
        console.print(f"[bold green]nobody could tell:[/bold green] {CLAIM[outcome.config.guarantee]}")
    else:
        console.print(f"[bold red]not as if nothing had happened[/bold red] (--seed {outcome.config.seed})")


def listed(what: str, lines: Sequence[str]) -> str:
    """The first of these lines under a heading; nothing where there are none.

    >>> print(listed("differences", ["a", "b"]), end="")
    2 differences
      a
      b
    """
    return "".join(f"{line}\n" for line in [f"{len(lines):,} {what}", *(f"  {x}" for x in lines[:TOLD_MAX])] if lines)


def _faults(outcome: Outcome) -> Table:
    table = Table("fault", "times", "recoveries", "median", "longest")
    for kind, count in outcome.config.counts.items():
        took = [r.took_s for r in outcome.recoveries if r.kind is kind and r.took_s is not None]
        spans = (f"{statistics.median(took):.1f} s", f"{max(took):.1f} s") if took else ("", "")
        if count:
            table.add_row(kind, str(count), str(len(took)), *spans)
    return table
