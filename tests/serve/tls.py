"""Certificates that nobody signed, made by openssl."""

import pathlib
import subprocess


def certificate(directory: pathlib.Path, name: str) -> str:
    """Writes NAME.pem and NAME.key, and returns their path without the ending."""
    path = f"{directory / name}"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    files = ["-keyout", f"{path}.key", "-out", f"{path}.pem", "-subj", "/CN=localhost"]
    command = ["openssl", "req", "-x509", "-nodes", *curve, *files]
    subprocess.run(command, check=True, capture_output=True)
    return path
