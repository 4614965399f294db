"""What the command line may say."""

from __future__ import annotations

import signal

import pytest

from reknit.options import OptionError, parse


def test_the_stock_line_is_understood() -> None:
    options = parse("127.0.0.1:7071", {"timeout": 900, "is_host": "0", "last_call_timeout": "5"}, None)
    assert options.coordinators == "http://127.0.0.1:7071"
    assert options.address == "127.0.0.1"
    assert options.listen == "127.0.0.1:0"
    assert options.join_timeout == 600


@pytest.mark.parametrize(
    ("endpoint", "config", "urls"),
    [
        ("a,b:1, c", {}, "http://a:7070,http://b:1,http://c:7070"),
        ("a:1", {"tls": "1"}, "https://a:1"),
        ("a:1", {"ca": "ca.pem"}, "https://a:1"),
        ("a:1", {"ca": "ca.pem", "tls": "0"}, "http://a:1"),
        ("https://a:1,http://[::1]:2", {}, "https://a:1,http://[::1]:2"),
        ("[::1]:2", {}, "http://[::1]:2"),
    ],
)
def test_coordinators(endpoint: str, config: dict[str, str], urls: str) -> None:
    assert parse(endpoint, {**config, "advertise": "127.0.0.1"}, None).coordinators == urls


def test_the_environment_names_the_coordinator_if_the_line_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKNIT_COORDINATOR", "http://127.0.0.1:9")
    assert parse("", {}, None).coordinators == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("address", "listen"), [("10.1.2.3", "0.0.0.0:0"), ("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0"), ("fd00::1", "[::]:0")]
)
def test_it_listens_where_others_reach_it(address: str, listen: str) -> None:
    options = parse("127.0.0.1:1", {}, address)
    assert (options.address, options.listen) == (address, listen)
    assert parse("127.0.0.1:1", {"advertise": "127.0.0.1"}, address).address == "127.0.0.1"


def test_a_signal_is_named_as_people_name_it() -> None:
    for name in ("USR1", "SIGUSR1", "usr1"):
        assert parse("127.0.0.1", {"notice_signal": name}, None).notice_signal is signal.SIGUSR1


@pytest.mark.parametrize(
    ("endpoint", "config", "says"),
    [
        ("", {}, "no coordinator is named"),
        (" , ", {}, "no coordinator is named"),
        ("a b:1", {}, "resolved"),
        ("http://a:b", {}, "HOST:PORT"),
        ("ftp://a", {}, "HOST:PORT"),
        ("http://u@a", {}, "HOST:PORT"),
        ("http://a/path", {}, "HOST:PORT"),
        ("nowhere.invalid:1", {}, "--local-addr"),
        ("127.0.0.1", {"join_timout": "5"}, "join_timout"),
        ("127.0.0.1", {"join_timeout": "soon"}, "how many seconds"),
        ("127.0.0.1", {"join_timeout": "-1"}, "how many seconds"),
        ("127.0.0.1", {"join_timeout": "nan"}, "how many seconds"),
        ("127.0.0.1", {"read_timeout": "1e300"}, "how many seconds"),
        ("127.0.0.1", {"tls": "perhaps"}, "1 or 0"),
        ("127.0.0.1", {"notice_signal": "TERM"}, "USR1"),
        ("127.0.0.1", {"notice_signal": "SIGNONE"}, "USR1"),
    ],
)
def test_what_makes_no_sense_is_said_with_what_does(endpoint: str, config: dict[str, str], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse(endpoint, config, None)
