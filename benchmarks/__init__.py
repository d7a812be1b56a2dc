"""Benchmarks beside peers and the memory floor, all in one run; they are not part of the tests."""
