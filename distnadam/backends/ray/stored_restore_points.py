"""The record of an optimizer's restore points in Ray's key-value store, where the supervisor's
successor finds it even if all of the optimizer's processes died with the supervisor.
"""

from typing import Self

from ray.experimental import internal_kv

from distnadam.backends.ray.nodes import NAMESPACE
from distnadam.errors import ClusterError
from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.restore_points import RestoreMemory

_NAMESPACE = f"{NAMESPACE}-restore"


class StoredRestorePoints(RestoreMemory):
    """The record of one optimizer.

    Args:
        run: what begins the names of its processes.
    """

    def __init__(self, run: str) -> None:
        self._run = run

    @classmethod
    def of(cls, spec: ShardSpec) -> Self | None:
        """Return an optimizer's; None of one without a name, whose supervisor has no successor."""
        return None if spec.name is None else cls(spec.run_id)

    def read(self) -> bytes | None:
        """Return what was written last; None if nothing was."""
        record: bytes | None = internal_kv._internal_kv_get(self._run, namespace=_NAMESPACE)
        return record

    def write(self, record: bytes) -> None:
        """Keep a record in place of the last.

        Raises:
            ClusterError: Ray's head does not take it.
        """
        try:
            internal_kv._internal_kv_put(self._run, record, namespace=_NAMESPACE)
        except Exception as error:
            raise ClusterError(
                f"Ray's key-value store does not take the record of what {self._run} can go back "
                f"to: {error}"
            ) from error


def forget(run: str) -> None:
    """Delete the records of the optimizers whose processes' names begin so."""
    internal_kv._internal_kv_del(run, del_by_prefix=True, namespace=_NAMESPACE)
