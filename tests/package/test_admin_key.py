# SPDX-License-Identifier: Apache-2.0
"""Where the admin door's key may come from, and that no refusal repeats it."""

import hmac
import os
from types import SimpleNamespace

import pytest

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.client.cli import key_for
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.checks import check_door

KEY = "0123456789abcdef-key"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(admin_key.VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


def parse(**options):
    return SleepModeConfig.from_vllm_config(
        SimpleNamespace(additional_config={"sleep_mode": options})
    )


def test_the_file_comes_before_the_environment(file, monkeypatch):
    assert admin_key.read() is None
    assert admin_key.read(str(file)) == KEY
    monkeypatch.setenv(admin_key.VARIABLE, f"{KEY}-other")
    assert admin_key.read() == f"{KEY}-other"
    assert admin_key.read(str(file)) == KEY


@pytest.mark.parametrize("given", ["", "short", f"{KEY} ", f"{KEY}\n", f"{KEY}\u00e9"])
def test_what_is_no_key_is_refused_and_not_repeated(given, monkeypatch):
    monkeypatch.setenv(admin_key.VARIABLE, given)
    with pytest.raises(ValueError, match=admin_key.VARIABLE) as refused:
        admin_key.read()
    assert not given or given not in str(refused.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_open_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(ValueError, match=rf"others can read .*mode {mode:o}.*chmod 600") as refused:
        admin_key.read(str(file))
    assert KEY not in str(refused.value)


def test_a_file_must_be_one(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        admin_key.read(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no regular file"):
        admin_key.read(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ValueError, match="no regular file"):
        admin_key.read(str(tmp_path / "pipe"))


def test_a_link_to_a_secret_is_followed(file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    assert admin_key.read(str(tmp_path / "link")) == KEY


def test_keys_are_compared_as_a_whole():
    digest = admin_key.digest(KEY)
    assert KEY.encode() not in digest
    assert admin_key.is_key(KEY.encode(), digest)
    for wrong in (b"", KEY[:-1].encode(), KEY.encode() + b"\0", KEY.upper().encode(), b"\xff"):
        assert not admin_key.is_key(wrong, digest)


def test_how_long_a_comparison_takes_tells_nothing_of_the_key(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append((one, other)))
    digest = admin_key.digest(KEY)
    for given in (b"", KEY[:1].encode(), KEY.encode(), b"x" * 1000):
        admin_key.is_key(given, digest)
    assert len(compared) == 4  # whatever is given
    assert {len(each) for pair in compared for each in pair} == {32}  # digests of a length


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"admin_port": 0}, "admin_port=0"),
        ({"admin_port": "8100"}, "admin_port='8100'"),
        ({"admin_port": 8100, "admin_socket": "/run/s"}, "exclude each other"),
        ({"admin_host": "127.0.0.1"}, "admin_host needs admin_port"),
        ({"admin_key_file": "/run/key"}, "admin_key_file needs admin_port or admin_socket"),
        ({"admin_socket": "s"}, "admin_socket='s'.*an absolute path"),
        ({"admin_socket": "/" + "s" * 107}, "at most 107 bytes"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        parse(**options)


@pytest.mark.parametrize("name", ["admin_key", "adminkey", "admin_key_file"])
def test_a_key_in_the_configuration_is_refused_and_not_repeated(name):
    with pytest.raises(ValueError, match=f"{name}: ") as refused:
        parse(admin_port=8100, **{name: KEY})
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "host.example"])
def test_a_door_for_other_machines_needs_a_key(host, file, monkeypatch):
    with pytest.raises(ValueError, match=f"admin_host='{host}' is reached by other"):
        check_door(parse(admin_port=8100, admin_host=host))
    check_door(parse(admin_port=8100, admin_host=host, admin_key_file=str(file)))
    monkeypatch.setenv(admin_key.VARIABLE, KEY)
    check_door(parse(admin_port=8100, admin_host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_and_a_socket_need_none(host):
    check_door(parse(admin_port=8100, admin_host=host))
    check_door(parse(admin_socket="/run/vllm/admin"))
    check_door(parse())


def test_a_key_that_cannot_be_read_is_refused_at_the_start(file):
    file.chmod(0o644)
    with pytest.raises(ValueError, match="others can read"):
        check_door(parse(admin_port=8100, admin_key_file=str(file)))


@pytest.mark.parametrize(
    ("address", "is_sent"),
    [
        ("unix:/run/vllm/admin", True),
        ("http://127.0.0.1:8100", True),
        ("http://[::1]:8100", True),
        ("https://other.example", True),
        ("http://other.example:8100", False),
        ("http://192.0.2.1:8100", False),
    ],
)
def test_the_cli_sends_the_environments_key_in_clear_to_this_machine_alone(
    address, is_sent, file, monkeypatch
):
    monkeypatch.setenv(admin_key.VARIABLE, f"{KEY}-other")
    monkeypatch.setenv("VLLM_API_KEY", "of the server")
    assert key_for(address, None) == (f"{KEY}-other" if is_sent else "of the server")
    assert key_for(address, str(file)) == KEY
