"""Benchmark of the operators and of whole training steps: python -m bench. See bench/README.md.

    cases     the operators that are measured, as data
    common    options, records, tables, timing, accuracy, the machine
    measure   timings: profile, in_loop, sweep, train_step, run_all, test_regression
    static    what needs no run: traffic, kernel_resources, predict
    report    tables and figures of the records

Each folder imports only those above it. The package runs from a checkout.
"""
