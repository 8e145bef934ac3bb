"""API keys and TLS files: where they come from, and what is refused at the start."""

import ipaddress
import ssl
from collections.abc import Iterable, MutableMapping

from jmoe.config import checks
from jmoe.config.serve import ServeConfig
from jmoe.serve.front import Access, digest

VARIABLE = "JMOE_API_KEYS"
MIN_LENGTH = 16  # characters: only digests are kept, and short keys could be guessed


def read_access(cfg: ServeConfig, environment: MutableMapping[str, str]) -> Access:
    """Returns who may ask what. The keys leave the environment, which is inherited.

    Raises:
      ValueError: a key that is too short or no key, a host that others reach without
        keys, or TLS files that don't fit.
      OSError: a file can't be read.
    """
    digests = tuple(map(digest, _read_keys(cfg, environment.pop(VARIABLE, ""))))
    if not digests and not is_local(cfg.host):
        raise ValueError(
            f"host={cfg.host!r} is reached by others, so that keys are needed: --set "
            f"key_file=FILE with one a line, or {VARIABLE} in the environment."
        )
    _check_tls(cfg)
    return Access(cfg.limits, digests, cfg.open_routes)


def is_local(host: str) -> bool:
    """Returns whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_keys(cfg: ServeConfig, in_environment: str) -> list[str]:
    keys = _checked(VARIABLE, in_environment.split())
    if cfg.key_file is None:
        return keys
    text = checks.local_path("key_file", cfg.key_file).read_text("utf-8")
    lines = [line.strip() for line in text.splitlines()]
    found = _checked(f"key_file={cfg.key_file!r}", filter(None, lines))
    if not found:
        raise ValueError(f"key_file={cfg.key_file!r} has no key.")
    return keys + found


def _checked(where: str, keys: Iterable[str]) -> list[str]:
    """Returns keys that are well-formed; its errors never show a key."""
    found = list(keys)
    for number, key in enumerate(found, 1):
        printable = key.isascii() and key.isprintable() and " " not in key
        if not printable or len(key) < MIN_LENGTH:
            raise ValueError(
                f"{where}: key {number} of {len(found)} must be at least {MIN_LENGTH} "
                "characters, all of them printable ASCII and none a space."
            )
    return found


def _check_tls(cfg: ServeConfig) -> None:
    if cfg.tls_certificate is None or cfg.tls_key is None:
        return
    certificate = checks.local_path("tls_certificate", cfg.tls_certificate)
    key = checks.local_path("tls_key", cfg.tls_key)
    for path in (certificate, key):
        path.open().close()  # else no error names it
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"tls_certificate={cfg.tls_certificate!r} and tls_key={cfg.tls_key!r} must "
            f"be a PEM certificate and its key without a password: {error}."
        ) from error
