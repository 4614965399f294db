"""What ``--rdzv-endpoint`` and ``--rdzv-conf`` may say, and what a torchrun line means for reknit."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from dataclasses import dataclass
from typing import Any, Mapping
from urllib.parse import urlsplit

DEFAULT_PORT = 7070

# What stock torchrun's own backend takes: a line that is moved here may still say it, and it means nothing here.
_OF_C10D = frozenset(
    {
        "cas_backoff_max_seconds",
        "is_host",
        "keep_alive_interval",
        "keep_alive_max_attempt",
        "last_call_timeout",
        "rank",
        "store_type",
        "timeout",
        "use_libuv",
    }
)

_OURS = frozenset(
    {
        "advertise",
        "ca",
        "cert",
        "close_timeout",
        "connect_timeout",
        "heartbeat_timeout",
        "join_timeout",
        "key",
        "name",
        "notice_seconds",
        "notice_signal",
        "read_timeout",
        "tls",
        "token_file",
    }
)


class OptionError(ValueError):
    """What the command line says makes no sense; the text says what would."""


@dataclass(frozen=True)
class Options:
    """One node's options."""

    coordinators: str
    """URLs, with commas in between."""
    address: str
    """Where other nodes reach this one: a name or an IP address, without a port."""
    listen: str
    """Where this node listens for its neighbours, as an address and a port; port 0 is any."""
    name: str | None
    """What people call this node; its host and process id if none."""
    join_timeout: float
    """How long to wait for enough nodes, in seconds."""
    connect_timeout: float
    """How long to look for a coordinator before there was one, in seconds."""
    heartbeat_timeout: float
    """How long to look for a coordinator while one is needed and there was one before, in seconds."""
    read_timeout: float
    """How long to wait for an answer of the bootstrap store, in seconds."""
    close_timeout: float
    """How long to wait for the other nodes at the end, in seconds."""
    notice_signal: signal.Signals | None
    """The signal that says that this machine will be taken."""
    notice_seconds: float
    """In how many seconds it will be, after that signal."""
    ca: str | None
    cert: str | None
    key: str | None
    token_file: str | None


def parse(endpoint: str, config: Mapping[str, Any], local_addr: str | None) -> Options:
    """Reads what torchrun passes on.

    Raises:
        OptionError: It makes no sense.
    """
    unknown = sorted(set(config) - _OURS - _OF_C10D)
    if unknown:
        raise OptionError(f"--rdzv-conf: reknit knows no {', '.join(unknown)}; it knows {', '.join(sorted(_OURS))}")
    ca = _text(config, "ca") or os.environ.get("REKNIT_CA") or None
    coordinators = _coordinators(endpoint or os.environ.get("REKNIT_COORDINATOR", ""), _flag(config, "tls", ca is not None))
    address = _text(config, "advertise") or local_addr or _own_address(coordinators[0])
    return Options(
        coordinators=",".join(coordinators),
        address=address,
        listen=_listen(address),
        name=_text(config, "name"),
        join_timeout=_seconds(config, "join_timeout", 600),
        connect_timeout=_seconds(config, "connect_timeout", 60),
        heartbeat_timeout=_seconds(config, "heartbeat_timeout", 600),
        read_timeout=_seconds(config, "read_timeout", 60),
        close_timeout=_seconds(config, "close_timeout", 30),
        notice_signal=_signal(config, "notice_signal"),
        notice_seconds=_seconds(config, "notice_seconds", 120),
        ca=ca,
        cert=_text(config, "cert"),
        key=_text(config, "key"),
        token_file=_text(config, "token_file"),
    )


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    return str(value) if value not in (None, "") else None


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = str(config.get(key, default)).lower()
    if value in {"1", "true", "t", "yes", "y"}:
        return True
    if value in {"0", "false", "f", "no", "n"}:
        return False
    raise OptionError(f"--rdzv-conf {key}={value}: say 1 or 0")


def _seconds(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    # As much as any clock here takes.
    if not 0 < seconds < 1e9:
        raise OptionError(f"--rdzv-conf {key}={value}: say how many seconds, more than zero")
    return seconds


def _signal(config: Mapping[str, Any], key: str) -> signal.Signals | None:
    value = _text(config, key)
    if value is None:
        return None
    name = value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"
    found = signal.Signals.__members__.get(name)
    # torchrun itself acts on these, and nobody can act on the last two.
    taken = {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGKILL", "SIGSTOP"}
    if found is None or name in taken:
        raise OptionError(f"--rdzv-conf {key}={value}: say a signal that torchrun does not act on itself, like USR1")
    return found


def _coordinators(endpoint: str, tls: bool) -> list[str]:
    named = [one.strip() for one in endpoint.split(",") if one.strip()]
    if not named:
        raise OptionError(
            "no coordinator is named: --rdzv-endpoint=HOST:PORT[,HOST:PORT...], where `reknit serve` listens"
        )
    return [_url(one, tls) for one in named]


def _url(endpoint: str, tls: bool) -> str:
    url = endpoint if "://" in endpoint else f"{'https' if tls else 'http'}://{endpoint}"
    wrong = OptionError(f"--rdzv-endpoint: {endpoint!r} is no HOST:PORT, and no http:// or https:// URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in {"http", "https"} or not host or parts.path not in {"", "/"} or parts.query or "@" in parts.netloc:
        raise wrong
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{port or DEFAULT_PORT}"


def _own_address(coordinator: str) -> str:
    """The address from which this machine reaches the coordinator: others reach it there, unless somebody knows better."""
    parts = urlsplit(coordinator)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Sends nothing: it only asks the routing table.
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as why:
        raise OptionError(
            f"cannot tell this node's own address, for {parts.hostname} cannot be resolved or reached ({why}); say it with "
            "--local-addr, or check --rdzv-endpoint"
        ) from None


def _listen(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return "[::]:0" if socket.has_dualstack_ipv6() else "0.0.0.0:0"
    if parsed.is_loopback:
        return f"[{parsed}]:0" if parsed.version == 6 else f"{parsed}:0"
    return "[::]:0" if parsed.version == 6 else "0.0.0.0:0"
