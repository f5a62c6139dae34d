"""The limit of pytest bench --benchmark-compare."""

import pytest
from pytest_benchmark.utils import parse_compare_fail


def pytest_configure(config: pytest.Config) -> None:
    """Make --benchmark-compare fail for calls that are 15 % slower, if no other limit is given."""
    if config.getoption("benchmark_compare") and not config.getoption("benchmark_compare_fail"):
        config.option.benchmark_compare_fail = [parse_compare_fail("min:15%")]
