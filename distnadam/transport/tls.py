"""TLS between hosts, with the certificates that Ray's own has."""

import os
import ssl

from distnadam.errors import LaneError


def tls(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """Return the TLS of one end, with the certificates that Ray's own TLS has; None without it.

    Raises:
        LaneError: they cannot be read.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")
    try:
        authority, certificate, key = (os.environ[name] for name in names)
        context = ssl.create_default_context(purpose, cafile=authority)
        context.load_cert_chain(certificate, key)
    except (KeyError, OSError) as error:
        raise LaneError(
            f"RAY_USE_TLS is on, and its certificates cannot be used: {error}"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    return context
