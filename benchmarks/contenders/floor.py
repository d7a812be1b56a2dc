"""The bytes of a step with views alone: (8W + 24) a parameter, for W = 2, by two threads.

Each worker reads its gradient, as whoever checks it does; each shard, half of the model, reads both
gradients, the parameters and both moments, and writes these three, the parameters elsewhere.
"""

import argparse
import json
import time

import numba
import numpy as np


@numba.njit(parallel=True, fastmath=True)
def look(first: np.ndarray, second: np.ndarray) -> float:
    total = np.float32(0)
    for i in numba.prange(first.size):
        total += first[i] + second[i]
    return total


@numba.njit(parallel=True)
def move(
    first: np.ndarray,
    second: np.ndarray,
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
) -> None:
    for i in numba.prange(p.size):
        x = first[i] + second[i]
        out[i] = p[i] + x
        m[i] += x
        v[i] += x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=10**6)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
    first, second, p, m, v, out = (np.ones(args.elements, np.float32) for _ in range(6))
    times = []
    for _ in range(args.steps + 1):  # the first compiles
        began = time.perf_counter()
        look(first, second)
        move(first, second, p, m, v, out)
        times.append(time.perf_counter() - began)
        p, out = out, p
    print(json.dumps(times[1:]))


if __name__ == "__main__":
    main()
