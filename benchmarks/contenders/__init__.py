"""Whole steps by several libraries, each a program that prints one JSON line: seconds of each step
as one worker saw it.
"""
