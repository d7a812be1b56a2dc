"""What the compiled copy of a tree's arrays and its caller agree on: its name and its arguments in
C's types, and where CPython and NumPy keep what it reads.

The arguments are a tree, then addresses and counts of what follows it.

- Slots: addresses of objects. The first is the tree's, which the function puts there; the others it
  finds: the containers' and the leaves'.
- Containers, `CONTAINER` numbers each, every one behind that which it is in: its slot, the address
  of its type, how many children it has, and the first of these among all.
- Of each child its key's address, 0 in a sequence, and its slot; the children of a dict in order.
- Runs, `RUN` numbers each: the slots of the first leaf and of that behind the last, addresses of
  what each is to be (its number of dimensions, then these, one after the other) and of where the
  elements go. Of each, whether the sum of its squares is not finite, which the function says.
- `CONSTANTS`: addresses of what is called, and of types; and of the arrays' dtype.

It returns CONTAINERS where the tree has other ones than these, OTHER where some leaf is no array as
expected, and any may have been copied; else the sum of LARGE, if some run's sum of squares is not
finite, and STRANGE, if some keys are equal to those known, but others.

These places are part of both C interfaces: the macros PyList_GET_ITEM, PyTuple_GET_ITEM and
Py_TYPE, PyArray_DATA, PyArray_NDIM, PyArray_DIMS, PyArray_DESCR and PyArray_FLAGS are compiled into
every extension. Where a dict's items lie is the interpreter's own matter: it is relied on where
`gather` says so, and of dicts that have had nothing but these strings for keys; PyDict_Next, which
takes as long as all else, is for the others. `gather` tries all out before it relies on them.

Source: the headers cpython/listobject.h, cpython/tupleobject.h, object.h, numpy/ndarraytypes.h,
cpython/dictobject.h and internal/pycore_dict.h.
"""

import ctypes

ENTRY = "distnadam_gather"
"""The function's name."""
SIZE, ITEMS, TYPE = 16, 24, 8
"""Bytes from an object's beginning to a list's and a tuple's length, to the address of a list's
items and to a tuple's own, and to the type.
"""
KEYS, VALUES = 32, 40
"""The same in a dict, whose number of items is where a list's is: to the address of its table, and
of the values that it has apart from that, if it has.
"""
INDEX_BITS, KIND, ENTRIES, INDICES = 9, 10, 24, 32
"""The same in a dict's table: the power of two that its indices take in bytes (a byte), what keys
it has (a byte), how many entries, also of what was deleted, and the indices, behind which these
are: each the addresses of a key and a value, if the keys are of the kind STRINGS.
"""
STRINGS = 1
DATA, DIMENSIONS, SHAPE, DESCR, FLAGS = 16, 24, 32, 56, 64
"""The same in an array: the address of its elements, the number of its dimensions (an int), the
address of these, its dtype, its flags (an int).
"""
READABLE = 0x1 | 0x100
"""The flags of an array that is contiguous, in C's order, and aligned."""
CONTAINER, RUN = 4, 4
"""Numbers of a container, and of a run."""
CONSTANTS = (
    *("PyDict_Next", "PyUnicode_Compare", "dict", "list", "str", "ndarray", "dtype"),
    "dicts_are_known",
)
"""The functions and types that are known by address, in this order; the dtype is the arrays'. The
last is 1 where a dict's items are read where they lie, else 0.
"""
CONTAINERS, OTHER = -2, -1
"""What it returns where nothing, or any leaf, was copied."""
LARGE, STRANGE = 1, 2
"""What the sum that it returns else is made of."""
PROTOTYPE = ctypes.PYFUNCTYPE(
    ctypes.c_ssize_t,
    ctypes.py_object,
    ctypes.c_void_p,
    *(ctypes.c_void_p, ctypes.c_ssize_t),
    *(ctypes.c_void_p,) * 2,
    *(ctypes.c_void_p, ctypes.c_ssize_t),
    *(ctypes.c_void_p,) * 2,
)
"""The function's type; the interpreter's lock is held, so that no object changes meanwhile."""
