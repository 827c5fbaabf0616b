"""Which HTTP proxy gRPC goes through to reach a server: as the environment says, never for this machine itself."""

import ipaddress
import os
from urllib.parse import urlsplit

from gradwire._wire.channels import host_of, reaches_this_machine

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Those that gRPC reads, in its order; it knows them in lower case only."""
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")


def proxy_used(target: str) -> str:
    """What an error says of the proxy on the way to a target: the variable, the proxy and how to avoid it; "" where
    there is none. A password in the proxy's URL is left out."""
    if reaches_this_machine(target):
        return ""
    variable = next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)
    host = host_of(target)
    if variable is None or _bypassed(host):
        return ""
    value = os.environ[variable]
    parts = urlsplit(value if "://" in value else f"http://{value}")
    proxy = parts.netloc.rpartition("@")[2] or "a proxy"
    return (
        f"The connection goes through {proxy}, the proxy that the environment variable {variable} names; if the server "
        f"can be reached without it, set no_proxy={host}"
    )


def _bypassed(host: str) -> bool:
    """Whether no_proxy excludes a host: by the end of its name, or by a network its address is in."""
    listed = next((value for name in _NO_PROXY_VARIABLES if (value := os.environ.get(name))), "")
    return any(_takes_out(entry.strip().lower(), host) for entry in listed.split(",") if entry.strip())


def _takes_out(entry: str, host: str) -> bool:
    if host.endswith(entry):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
