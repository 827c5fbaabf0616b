"""Addresses that servers listen on, "host:port". Ground floor."""

import ipaddress

from trainer_service.command_lines import SettingsError


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port".

    Raises:
        SettingsError: It has no host or no port.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f'address {address!r} must be "host:port", for example "127.0.0.1:7777".')
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """host:port, with a v6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listens_on_loopback(listen: str) -> bool:
    """Whether only this machine can reach an address.

    Raises:
        SettingsError: It is not an address.
    """
    host, _ = split_address(listen)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
