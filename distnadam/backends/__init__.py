"""Where the shards live: in this process, or in Ray actors. One seam (`base`), two implementations
(`local` and `ray`), and what chooses one (`factory`).
"""
