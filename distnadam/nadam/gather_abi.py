"""What the compiled copy of many arrays and its caller agree on: its name and its arguments in C's
types, and where CPython and NumPy keep what it reads.

The arguments are the first of a list's leaves to copy and the first behind these; then addresses:
of what each is to be (its number of dimensions, then these, one after the other), of where the
elements go, and of `EXPECTED`'s numbers; then the list. It returns one of the three results below.

These places are part of both C interfaces: the macros PyList_GET_ITEM and Py_TYPE, PyArray_DATA,
PyArray_NDIM, PyArray_DIMS, PyArray_DESCR and PyArray_FLAGS are compiled into every extension.
`gather` tries them out before it relies on them.

Source: the headers cpython/listobject.h, object.h and numpy/ndarraytypes.h.
"""

import ctypes

ENTRY = "distnadam_gather"
"""The function's name."""
LIST_SIZE, LIST_ITEMS, TYPE = 16, 24, 8
"""Bytes from an object's beginning to a list's length, to the address of its items, to the type."""
DATA, DIMENSIONS, SHAPE, DESCR, FLAGS = 16, 24, 32, 56, 64
"""The same in an array: the address of its elements, the number of its dimensions (an int), the
address of these, its dtype, its flags (an int).
"""
READABLE = 0x1 | 0x100
"""The flags of an array that is contiguous, in C's order, and aligned."""
EXPECTED = 2
"""Numbers that all arrays are compared with: the addresses of their type and of their dtype."""
OTHER, COPIED, LARGE = range(3)
"""Some leaf is no array as expected, and any may have been copied; all are copied, and the sum of
their squares is finite; or it is not.
"""
PROTOTYPE = ctypes.PYFUNCTYPE(
    ctypes.c_ssize_t, *(ctypes.c_ssize_t,) * 2, *(ctypes.c_void_p,) * 3, ctypes.py_object
)
"""The function's type; the interpreter's lock is held, so that no array changes meanwhile."""
