"""Why an actor did not start, as users get it, and what Ray is given to start it. No Ray runs."""

from ray.exceptions import RayActorError

from distnadam.backends.ray.actors import _titled
from distnadam.backends.ray.nodes import start_error
from distnadam.errors import ShardLost, VersionMismatch


def test_an_actor_that_did_not_start_comes_with_its_whole_reason() -> None:
    reason = "The actor died because of an error raised in its creation task:\nOSError: no space"
    ours = start_error(RayActorError(error_msg=reason))
    assert type(ours) is ShardLost
    assert "a shard did not start" in str(ours) and "OSError: no space" in str(ours)


def test_a_node_that_lacks_a_package_is_named() -> None:
    reason = "creation task (pid=1, ip=10.0.0.7)\nModuleNotFoundError: No module named 'numba'"
    ours = start_error(RayActorError(error_msg=reason))
    assert isinstance(ours, VersionMismatch)
    assert "node 10.0.0.7 lacks the package 'numba'" in str(ours)


def test_ray_is_given_a_class_of_a_title_once() -> None:
    """It keeps each one for as long as the process lives, and a supervisor starts many shards."""
    assert _titled(list, "Shard", 1) is _titled(list, "Shard", 1)
    assert _titled(list, "Shard", 1) is not _titled(list, "Shard", 2)
