"""Who decides what happens when processes die: the watch (`supervisor`), what it does (`recovery`),
and to whom (`cluster`, `processes`).
"""
