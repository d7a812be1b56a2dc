"""Programs that step with one library each and print one JSON line: each step's seconds.

A step is timed as one worker sees it.
"""
