"""What the compiled loop and its caller agree on: its name and its arguments in C's types.

The arguments are the number of groups of gradients and of parts, and whether the new parameters
bypass the caches; then addresses: the gradients' addresses, the groups' sizes, parameters, both
moments, where the new parameters and both new moments go, the parts (four numbers each, `PART`),
coefficients
(`StepScalars.coefficients`), the count that a sum is divided by (NaN for
none), the scales, where the mean is kept
(0 for nowhere), where the new parameters go rounded to bfloat16 (0 for nowhere; a float32 loop
only), and `CONSTANTS`.
"""

import ctypes

ENTRY = "distnadam_step"
"""The function's name."""
PART = 4
"""Numbers of a part: where it begins and ends, the index of its setting, and that of its scale."""
CONSTANTS = (ctypes.c_uint32 * 4)(1, 0x7FFF, 0x8000, 0x7FC0)
"""By which float32 is rounded to bfloat16: its last bit there, just less than half of that, the
sign and the other bits of a NaN. They are an argument since code that has no constants of its own
runs wherever it is loaded.
"""
ARGUMENTS = (*(ctypes.c_ssize_t,) * 3, *(ctypes.c_void_p,) * 15)
"""The function's argument types."""
PROTOTYPE = ctypes.CFUNCTYPE(None, *ARGUMENTS)
"""The function's type; the interpreter's lock is free while it runs."""
