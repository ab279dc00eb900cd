"""`python -m tests.mutants`: does the suite miss each safeguard that is taken out?

A table, one line per mutant. Exit 1 if one survives or shows nothing, or if the unchanged copy is red.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tests.mutants import billing, metering, quota
from tests.mutants.mutant import Edit, Mutant
from tests.mutants.run import NO_OP, ROOT, Result, Verdict, copy_of, end_all, run

AT_A_TIME_MAX = 2
"""Some start a stack of their own, which two cores just bear."""
GROUPS = {"metering": metering.MUTANTS, "quota": quota.MUTANTS, "billing": billing.MUTANTS}
REDS_SHOWN_MAX = 3


def main() -> int:
    """Run the chosen mutants and print what became of them."""
    arguments = _arguments()
    chosen = [
        mutant
        for group, mutants in GROUPS.items()
        for mutant in mutants
        if group in (arguments.group or GROUPS) and (not arguments.only or mutant.name in arguments.only)
    ]
    if arguments.list:
        for mutant in chosen:
            sys.stdout.write(f"{mutant.name}: {mutant.removes}\n")
        return 0
    if not chosen:
        sys.stderr.write("no mutant of this name\n")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes along what runs, as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="meterline-mutants-") as folder:
        # One moment of the tree for all of them, whatever is edited meanwhile.
        original = Path(folder) / "original"
        copy_of(ROOT, original)
        results = _run_all([_no_op(chosen), *chosen], original)
    console = Console(width=max(Console().width, 150))
    console.print(_table(results))
    for result in results:
        if result.trouble:
            console.print(f"\n{result.name}: {result.trouble}", markup=False, highlight=False)
    good = sum(result.verdict is Verdict.KILLED for result in results)
    console.print(f"{good} of {len(chosen)} mutants killed; no-op {results[0].verdict}")
    return 0 if all(result.verdict in {Verdict.KILLED, Verdict.GREEN} for result in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--group", action="append", choices=GROUPS, help="only these groups")
    parser.add_argument("--only", action="append", metavar="NAME", help="only these mutants")
    parser.add_argument("--list", action="store_true", help="name them and what they remove; run nothing")
    return parser.parse_args()


def _no_op(chosen: list[Mutant]) -> Mutant:
    """Every test that is used, on a copy in which a comment is added."""
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    return Mutant(
        name=NO_OP,
        removes="nothing: what is red here is red without a mutation",
        edits=[Edit("app/meterline/errors.py", "\nclass UserError(", "\n# Changed.\nclass UserError(")],
        tests=[test for test in tests if not any(test != other and _holds(other, test) for other in tests)],
        speaks_of="",
        limit_s=sum(sorted({mutant.limit_s for mutant in chosen})) + 600,
    )


def _holds(whole: str, part: str) -> bool:
    """Whether one node id is a part of the other: a file of a folder, a test of a file."""
    return part.startswith((f"{whole}::", f"{whole}/", f"{whole}["))


def _run_all(mutants: list[Mutant], original: Path) -> list[Result]:
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(AT_A_TIME_MAX) as threads:
        running = [threads.submit(run, mutant, original) for mutant in mutants]
        try:
            for done in as_completed(running):
                result = done.result()
                results[result.name] = result
                sys.stderr.write(f"{result.name}: {result.verdict} ({result.seconds:.0f} s)\n")
        except BaseException:  # Ctrl-C, too: no copy stays running
            threads.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise
    return [results[mutant.name] for mutant in mutants]


def _table(results: list[Result]) -> Table:
    table = Table("mutant", "", "red tests, and the first assertion that failed", "s", show_lines=True)
    for result in results:
        shown = [
            f"{red['test'].split('/')[-1]}\n  {red['place']}: {red['line'][:120]}"
            for red in result.reds[:REDS_SHOWN_MAX]
        ]
        if len(result.reds) > REDS_SHOWN_MAX:
            shown.append(f"and {len(result.reds) - REDS_SHOWN_MAX} more")
        cells = [result.name, result.verdict, "\n".join(shown), f"{result.seconds:.0f}"]
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
