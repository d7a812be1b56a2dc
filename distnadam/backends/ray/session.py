"""Joining the Ray that runs already, or starting one of our own. What cannot be joined is said in
one sentence, and soon.
"""

import logging
import os
import secrets
import socket
import time

import ray

from distnadam.config import Options
from distnadam.errors import ClusterError, NotRunning

log = logging.getLogger("distnadam")

_ANSWER_S = 5.0
_AGAIN_S = 0.05


class OwnedRay:
    """A Ray that we started, behind a token that only this process and its children know."""

    def __init__(self, options: Options | None) -> None:
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(
                32
            )  # Ray asks for one by itself, and would write it to the home
        store = options.object_store_bytes if options is not None else None
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=store,
            namespace="distnadam-driver",
        )
        if (
            "RAY_AUTH_MODE" not in os.environ
        ):  # Ray before 2.59, imported before we could ask for it
            log.warning(
                "whoever reaches the Ray started here may run code on it: set RAY_AUTH_MODE=token"
            )

    def shut_down(self) -> None:
        """Stop every process of this Ray; the environment keeps the token, which Ray has read for
        good.
        """
        ray.shutdown()


def connect_or_start(options: Options | None, *, start: bool = True) -> OwnedRay | None:
    """Join the Ray of this process or of `RAY_ADDRESS`; where there is neither, start and return
    our own, or raise NotRunning.
    """
    if ray.is_initialized():
        return None
    address = os.environ.get("RAY_ADDRESS")
    if not address and not start:
        raise NotRunning(
            "no Ray runs in this process and RAY_ADDRESS is not set: there is nothing to connect "
            "to; give the head's HOST:PORT"
        )
    if not address:
        return OwnedRay(options)
    _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False, namespace="distnadam-driver")
    except ConnectionError as error:  # Ray does not say why: it has only heard no
        told = (
            f"cannot join the Ray at RAY_ADDRESS={address}, which answers but refuses: "
            f"RAY_AUTH_MODE is {_auth_mode()} here"
        )
        raise ClusterError(
            f"{told}; give it, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as the cluster's hosts "
            "have them"
        ) from error
    except Exception as error:
        first = str(error).splitlines()[0]
        raise ClusterError(
            f"cannot join the Ray at RAY_ADDRESS={address} (RAY_AUTH_MODE is {_auth_mode()}): "
            f"{first}"
        ) from error
    return None


def _auth_mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "unset")


def _require_listener(address: str) -> None:
    """Raise ClusterError where nobody listens at HOST:PORT for some seconds; Ray itself tries for
    minutes, and may end the process.
    """
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdigit():
        return
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline or isinstance(error, socket.gaierror):
                told = f"nobody answers at RAY_ADDRESS={address} ({error.strerror or error})"
                raise ClusterError(
                    f"{told}: expected the address of a running Ray's head, as HOST:PORT"
                ) from error
            time.sleep(_AGAIN_S)
