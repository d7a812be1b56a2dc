"""What the frameworks' own forms of the optimizer share: which rank a process is, and the shards
that all ranks of a script have.
"""
