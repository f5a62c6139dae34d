"""The limit of pytest bench --benchmark-compare."""

import pytest
from pytest_benchmark.utils import parse_compare_fail

WORSE = "min:15%"  # the least time of a call, which other processes disturb least


def pytest_configure(config: pytest.Config) -> None:
    """Make --benchmark-compare fail for slower calls, unless --benchmark-compare-fail is given."""
    if config.getoption("benchmark_compare") and not config.getoption("benchmark_compare_fail"):
        config.option.benchmark_compare_fail = [parse_compare_fail(WORSE)]
