"""A cloud's notice that this host goes away, as its metadata service gives it to a spot instance.

AWS: two minutes before, `spot/instance-action` has a time, behind a session's token (IMDSv2); GCP:
thirty seconds before, `instance/preempted` turns TRUE.
"""

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException

log = logging.getLogger("distnadam")

_TIMEOUT_S = 2.0
_TOKEN_S = 60
_GCP_S = 30.0
_LEAST_S = 15.0
"""Seconds given in any case: Ray ends a node at the deadline, and this host's clock may be fast."""
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a cloud says.

    Attributes:
        why: in words.
        left_s: seconds until the host is gone.
    """

    why: str
    left_s: float


def of_aws(base: str) -> Notice | None:
    """Return the notice of an AWS spot instance, or None.

    Args:
        base: the metadata service, http://169.254.169.254 on AWS.

    Raises:
        OSError: the service does not answer.
    """
    asks = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
    token = _get(f"{base}/latest/api/token", asks, method="PUT")
    knows = {"X-aws-ec2-metadata-token": token or ""}
    said = _get(f"{base}/latest/meta-data/spot/instance-action", knows)
    if said is None:
        return None
    action = json.loads(said)
    ends = datetime.fromisoformat(action["time"])
    if ends.tzinfo is None:
        ends = ends.replace(tzinfo=UTC)
    left_s = (ends - datetime.now(UTC)).total_seconds()
    why = f"AWS: {action['action']} at {action['time']}"
    return Notice(why=why, left_s=max(_LEAST_S, left_s))


def of_gcp(base: str) -> Notice | None:
    """Return the notice of a preemptible GCP instance, or None.

    Args:
        base: the metadata service, http://metadata.google.internal on GCP.

    Raises:
        OSError: the service does not answer.
    """
    knows = {"Metadata-Flavor": "Google"}
    said = _get(f"{base}/computeMetadata/v1/instance/preempted", knows)
    if said is None or said.strip() != "TRUE":
        return None
    return Notice(why="GCP: preempted", left_s=_GCP_S)


CLOUDS: dict[str, tuple[str, Callable[[str], Notice | None]]] = {
    "aws": ("http://169.254.169.254", of_aws),
    "gcp": ("http://metadata.google.internal", of_gcp),
}
"""The address of each cloud's metadata service, and how it is asked."""


def await_notice(cloud: str, metadata: str | None, every_s: float) -> Notice:
    """Wait for a cloud's notice, however long that takes; a service that fails is asked again.

    Args:
        cloud: a key of `CLOUDS`.
        metadata: the address of the metadata service; None: the cloud's own.
        every_s: seconds between two looks.
    """
    base, ask = CLOUDS[cloud]
    while True:
        try:
            if (notice := ask(metadata or base)) is not None:
                return notice
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            log.warning("the metadata service of %s: %s", cloud, error)
        time.sleep(every_s)


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Return what a service answers; None for 404, which is what it says of what is not there."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read(_MOST_BYTES).decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return text
