"""Certificates for Ray's TLS, of an authority of the tests' own."""

import subprocess
from pathlib import Path


def certificates(directory: Path) -> dict[str, str]:
    """Make an authority and a certificate for all hosts; return the environment for TLS."""
    ca, server = directory / "ca", directory / "server"
    names = ",".join([f"IP:10.77.0.{number}" for number in range(1, 5)] + ["IP:127.0.0.1"])
    (directory / "names").write_text(f"subjectAltName={names}\n")
    make = [
        (
            f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout {ca}.key -out "
            f"{ca}.crt"
        ),
        f"req -newkey rsa:2048 -nodes -subj /CN=host -keyout {server}.key -out {server}.csr",
        (
            f"x509 -req -in {server}.csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial -days 2 "
            f"-extfile {directory}/names -out {server}.crt"
        ),
    ]
    for command in make:
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    files = {
        "RAY_TLS_SERVER_CERT": f"{server}.crt",
        "RAY_TLS_SERVER_KEY": f"{server}.key",
        "RAY_TLS_CA_CERT": f"{ca}.crt",
    }
    return {"RAY_USE_TLS": "1", **files}
