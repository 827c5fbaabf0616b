"""Network interfaces of this machine. Ground floor."""

import ipaddress
import socket

import psutil

from trainer_service.command_lines import SettingsError


def interface_of(address: str) -> str:
    """The name of the interface that has an address, such as "eth0".

    Raises:
        SettingsError: None has it.
    """
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            spoken = each.family in (socket.AF_INET, socket.AF_INET6)
            if spoken and ipaddress.ip_address(each.address.partition("%")[0]) == wanted:
                return name
    raise SettingsError(f"No network interface of this machine has the address {address}.")


def own_address(host: str, *, option: str) -> str:
    """The address that a name or an address of this machine stands for.

    Args:
        host: The name or address.
        option: What it was given for, for the error.

    Raises:
        SettingsError: It stands for no address, for all of them, or for one of another machine.
    """
    try:
        found = [str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError as exc:
        raise SettingsError(f"{option}: {host!r} is no name or address that this machine knows: {exc}.") from exc
    if any(ipaddress.ip_address(address.partition("%")[0]).is_unspecified for address in found):
        raise SettingsError(
            f"{option}: {host} is every interface; give the address of the one by which the other nodes reach this "
            "machine."
        )
    for address in found:
        try:
            interface_of(address)
        except SettingsError:
            continue
        return address
    raise SettingsError(f"{option}: {host} ({', '.join(found)}) is not an address of this machine.")
