"""A cloud's notice that this host goes away, as its metadata service gives it to a spot instance.

AWS: two minutes before, `spot/instance-action` has an action and a time, behind a session's token
(IMDSv2); one that is hibernated is so at once. GCP: thirty seconds before, `instance/preempted`
turns TRUE; sixty before a host is maintained whose machines cannot move, those with GPUs, an hour,
`instance/maintenance-event` says so. Azure: thirty seconds before, the scheduled events have one of
the machine, which turns the service on by asking for the first time. What only may happen is not
acted on: AWS's recommendation to rebalance, and what a machine lives through, moved or frozen.
"""

import email.utils
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

log = logging.getLogger("distnadam")

_TIMEOUT_S = 2.0
_TOKEN_S = 60
"""Seconds for which a token is valid; each look has its own."""
_GCP_S = 30.0
_MAINTENANCE_S = 60.0
_ENDS = "Preempt", "Terminate", "Redeploy", "Reboot"
"""The events of Azure after which a machine's processes are gone."""
_AZURE = "metadata/scheduledevents?api-version=2020-07-01"
_AZURE_NAME = "metadata/instance/compute/name?api-version=2021-02-01&format=text"
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
    at = action.get("time", "once")
    return Notice(why=f"AWS: {action['action']} at {at}", left_s=_left_s(at))


def of_gcp(base: str) -> Notice | None:
    """Return the notice of a GCP instance that is preempted, or ends for maintenance, or None.

    Args:
        base: the metadata service, http://metadata.google.internal on GCP.

    Raises:
        OSError: the service does not answer.
    """
    knows = {"Metadata-Flavor": "Google"}
    instance = f"{base}/computeMetadata/v1/instance"
    if (_get(f"{instance}/preempted", knows) or "").strip() == "TRUE":
        return Notice(why="GCP: preempted", left_s=_GCP_S)
    event = (_get(f"{instance}/maintenance-event", knows) or "").strip()
    if event.startswith("TERMINATE"):
        return Notice(why=f"GCP: {event}", left_s=_MAINTENANCE_S)
    return None


def of_azure(base: str) -> Notice | None:
    """Return the notice of an Azure machine, or None.

    Args:
        base: the metadata service, http://169.254.169.254 on Azure.

    Raises:
        OSError: the service does not answer.
    """
    knows = {"Metadata": "true"}
    said = _get(f"{base}/{_AZURE}", knows)
    events = [] if said is None else json.loads(said)["Events"]
    ending = [event for event in events if event["EventType"] in _ENDS]
    if not ending:
        return None
    name = (_get(f"{base}/{_AZURE_NAME}", knows) or "").strip()
    for event in ending:  # of all machines of a scale set
        if name in event["Resources"]:
            at = event.get("NotBefore") or "once"
            return Notice(why=f"Azure: {event['EventType']} at {at}", left_s=_left_s(at))
    return None


def _left_s(at: Any) -> float:
    """Return the seconds until a time of ISO's form or RFC 1123's, in UTC unless it says otherwise;
    the least ones if it is over or is no time: that the host goes away is certain.
    """
    ends = None
    for read in (datetime.fromisoformat, email.utils.parsedate_to_datetime):
        with suppress(TypeError, ValueError):
            ends = ends or read(at)
    if ends is None:
        return _LEAST_S
    ends = ends if ends.tzinfo is not None else ends.replace(tzinfo=UTC)
    return max(_LEAST_S, (ends - datetime.now(UTC)).total_seconds())


CLOUDS: dict[str, tuple[str, Callable[[str], Notice | None]]] = {
    "aws": ("http://169.254.169.254", of_aws),
    "gcp": ("http://metadata.google.internal", of_gcp),
    "azure": ("http://169.254.169.254", of_azure),
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
        except (
            OSError,
            HTTPException,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:
            log.warning("the metadata service of %s: %s", cloud, error)
        time.sleep(every_s)


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Return what a service answers; None for 404, which is what it says of what is not there.

    It is asked directly: a proxy would be asked of its own host.
    """
    request = urllib.request.Request(url, headers=headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read(_MOST_BYTES).decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return text
