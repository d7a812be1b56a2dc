"""One shard in one process, whatever the process is part of: its machine's effects carried out. No
Ray.
"""
