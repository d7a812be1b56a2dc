"""Measurements beside peers and the memory floor, all sides in one run; never part of the tests."""
