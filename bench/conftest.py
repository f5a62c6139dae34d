"""pytest bench --benchmark-only: how a comparison with a saved run is judged."""

from pytest_benchmark.utils import parse_compare_fail

WORSE = "min:15%"  # the least time of a call: what a busy machine disturbs least


def pytest_configure(config):
    """--benchmark-compare fails where a call got slower, unless --benchmark-compare-fail says."""
    if config.getoption("benchmark_compare") and not config.getoption("benchmark_compare_fail"):
        config.option.benchmark_compare_fail = [parse_compare_fail(WORSE)]
