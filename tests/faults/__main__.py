"""Runs every fault on the real daemons and prints the table: `python -m tests.faults [pytest arguments]`."""

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
# rows that are proved where the data pipeline is tested
DATA = HERE.parent / "data_pipeline" / "beton"
DATA_TESTS = [DATA / f"test_{name}.py" for name in ("bad_data", "convert", "convert_interrupted")]


class Table:
    """Collects what the tests record and prints it by fault."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, None]:
        outcome = yield
        report = outcome.get_result()
        fault = item.get_closest_marker("fault")
        if fault is None or not (report.when == "call" or (report.when == "setup" and not report.passed)):
            return
        found = "  ".join(f"{key} {value}" for key, value in report.user_properties)
        self.rows.append((str(fault.args[0]), item.name, report.outcome, found))

    def print(self) -> None:
        """The table, numbered faults first."""
        rows = sorted(self.rows, key=lambda row: (not row[0].isdigit(), row[0].rjust(20)))
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())


def main(arguments: list[str]) -> int:
    """Runs the tests, slow ones included, and returns pytest's status."""
    table = Table()
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", str(HERE), *map(str, DATA_TESTS), *arguments], plugins=[table]
    )
    table.print()
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
