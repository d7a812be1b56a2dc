"""The maths of Nadam: scalars of one step, and one step over one range of elements."""
