"""What the compiled loop and its caller agree on: its name, its block, its arguments in C's types.

The arguments are the number of elements of the range, of gradients, of groups of them, of parts and
of elements of the kept mean; then addresses: scratch for the mean, the gradients' addresses, the
groups' sizes, parameters, both moments, where the new parameters go, the parts (four numbers each,
`PART`), coefficients (`StepScalars.coefficients`), the count that a sum is divided by, the scales,
scratch for the new parameters, the kept mean, and where the new parameters go rounded to bfloat16
(0 for nowhere; a float32 loop only).
"""

import ctypes

ENTRY = "distnadam_step"
"""The function's name."""
BLOCK = 512
"""Elements of a block: all of the step's arrays together then stay in a first-level cache of 32 KiB
between mean and step.
"""
PART = 4
"""Numbers of a part: where it begins and ends, the index of its setting, and that of its scale."""
ARGUMENTS = (*(ctypes.c_ssize_t,) * 5, *(ctypes.c_void_p,) * 14)
"""The function's argument types."""
