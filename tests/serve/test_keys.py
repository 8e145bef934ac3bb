"""Where keys come from, and a server that others reach without any."""

import pytest

from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.serve.front import digest
from jmoe.serve.keys import VARIABLE, read_access
from tests.serve.tls import certificate

KEYS = ["first-key-of-tests", "second-key-of-tests"]


def access(*assignments: str, **environment: str):
    return read_access(override(ServeConfig(), assignments), environment)


def refused(*assignments: str, **environment: str) -> str:
    with pytest.raises(ValueError) as error:
        access(*assignments, **environment)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "model.example"])
def test_a_host_that_others_reach_needs_a_key(host):
    assert f"host='{host}' is reached by others" in refused(f"host={host}")
    assert access(f"host={host}", **{VARIABLE: KEYS[0]}).digests == (digest(KEYS[0]),)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_this_machine_alone_none_is_needed(host):
    assert access(f"host={host}").digests == ()


def test_keys_are_of_a_file_and_of_the_environment_which_forgets_them(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEYS[0]}\n\n  {KEYS[1]}\n")
    environment = {VARIABLE: "third-key-of-tests", "OTHER": "1"}
    cfg = override(ServeConfig(), [f"key_file={file}"])
    found = read_access(cfg, environment).digests
    assert set(found) == set(map(digest, [*KEYS, "third-key-of-tests"]))
    assert environment == {"OTHER": "1"}


@pytest.mark.parametrize(
    "text", ["short", KEYS[0] + "\nkey with spaces in it", "ü" * 16]
)
def test_a_key_that_is_none_is_refused_and_not_shown(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    said = refused(f"key_file={tmp_path / 'keys'}")
    assert "must be at least 16 characters" in said and text not in said


def test_a_file_without_keys_or_no_file_is_named(tmp_path):
    (tmp_path / "keys").write_text("\n \n")
    assert "keys' has no key." in refused(f"key_file={tmp_path / 'keys'}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        access(f"key_file={tmp_path / 'nowhere'}")


def test_a_certificate_that_does_not_fit_its_key_is_refused(tmp_path):
    first, second = (certificate(tmp_path, name) for name in ("first", "second"))
    files = [f"tls_certificate={first}.pem", f"tls_key={first}.key"]
    assert access(*files).digests == ()
    assert "must be a PEM certificate and its key" in refused(
        files[0], f"tls_key={second}.key"
    )
    with pytest.raises(FileNotFoundError, match="nowhere"):
        access(files[0], "tls_key=nowhere")
