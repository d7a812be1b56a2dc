"""The step by NumPy's ufuncs, block by block. Its order of operations is the canonical one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.nadam.mean import Scratch, clipped_mean
from distnadam.nadam.step_scalars import PER_SETTING
from distnadam.nadam.stepper import Part, RangeStep, Stepper, check_denormals
from distnadam.tensors.arrays import own_errors, round_into


class NumPyStepper(Stepper):
    """The step by ufuncs, block by block."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        super().__init__(dtype, threads)
        self._scratch = [Scratch(dtype) for _ in range(threads)]

    @override
    @own_errors()
    def _step_share(self, thread: int, parts: Sequence[Part], step: RangeStep) -> None:
        check_denormals()
        scratch, slots, keep = self._scratch[thread], step.slots, step.keep
        settings = np.array(step.scalars.coefficients, self._dtype).reshape(-1, PER_SETTING)
        for part in parts:
            numbers, scale = settings[part.setting], step.scales[part.scale]
            c_g, c_m, epsilon, k_1, k_2, decay, l2, limit = numbers
            has_gradient, decays, has_l2, clips = ~np.isnan(numbers[[0, 5, 6, 7]])
            scaled, clipped = None if math.isnan(scale) else scale, limit if clips else None
            for begin in range(part.begin, part.end, scratch.block):
                end = min(begin + scratch.block, part.end)
                p, m, v = slots.p[begin:end], slots.m[begin:end], slots.v[begin:end]
                blocks = mean, a, b = scratch.blocks(end - begin)
                gradients = [x[begin:end] for x in step.gradients]
                g = clipped_mean(gradients, step.grouping, scaled, clipped, blocks)
                if keep is not None:
                    np.copyto(keep[begin:end], g)
                if has_l2:
                    np.multiply(p, l2, out=a)
                    g = np.add(g, a, out=mean)
                np.subtract(g, m, out=a)
                np.multiply(a, k_1, out=a)
                np.add(m, a, out=m)
                np.multiply(g, g, out=b)
                np.subtract(b, v, out=b)
                np.multiply(b, k_2, out=b)
                np.add(v, b, out=v)
                np.sqrt(v, out=b)
                np.add(b, epsilon, out=b)
                np.multiply(m, c_m, out=a)
                if has_gradient:
                    np.multiply(g, c_g, out=mean)
                    np.add(mean, a, out=a)
                np.divide(a, b, out=a)
                if decays:
                    np.multiply(p, decay, out=b)
                    np.add(b, a, out=a)
                np.subtract(p, a, out=slots.written[begin:end])
                if slots.rounded is not None:
                    round_into(slots.rounded[begin:end], slots.written[begin:end])
