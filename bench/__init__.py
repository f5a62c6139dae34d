"""Measurements of operators, one by one and within training, and of whole steps; their report.

A command of python -m bench is a module of its name:

    profile, inloop     the paper's profile: calls one by one, and within whole training steps
    ops, peers          a sweep over shapes, in every implementation there is
    step, workload      whole optimizer steps; the model that is trained for it
    machine             what a machine is, and what it can do at best
    traffic             bytes by counting: interpreter (Triton), emulator (tests/simt), dispatcher
    resources           compiled kernels: compiled (how), occupancy (blocks an SM)
    predict, cost       milliseconds by calculation
    report              records as text: digest (the newest of each), sections (tables);
                        as a page: plots, pictures, page
    device              all of it on a fresh GPU machine
    test_regression     for pytest-benchmark

Below them: cases (what is measured, as data), accuracy (what is right), timing, ranges (which
operator runs), records (JSON lines), options, tables. The folder runs from a checkout.
"""
