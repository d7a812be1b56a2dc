"""Arrays, where the tensors of a model lie in flat storage, and how a range is put together from
other ranges. Pure.
"""
