"""Checks before a server starts, so that a wrong setting ends with a clear message. Ground floor."""

import importlib.util
import os
import re

from trainer_service.access import ApiKeys
from trainer_service.addresses import listens_on_loopback, split_address
from trainer_service.command_lines import SettingsError
from trainer_service.config import GrpcServerConfig, ServerConfig, ServerTls, TrainerConfig


def read_umask() -> int:
    """GRADWIRE_UMASK, octal: permissions that new files and folders never get. By default only their owner can read
    them, since they contain training data.

    Raises:
        SettingsError: It is not an octal number from 0 to 777.
    """
    given = os.environ.get("GRADWIRE_UMASK") or "077"
    if not re.fullmatch("0*[0-7]{1,3}", given):
        raise SettingsError(f"GRADWIRE_UMASK is {given!r}; it must be an octal number such as 077 or 027.")
    return int(given, 8)


def read_api_keys() -> tuple[str, ...]:
    """Entries of GRADWIRE_API_KEY, which are separated by commas."""
    entries = os.environ.get("GRADWIRE_API_KEY", "").split(",")
    return tuple(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))


def check_server(config: ServerConfig) -> bool:
    """Checks what every server has: addresses, TLS files, keys, and who can reach it.

    Returns:
        Whether callers need a key, or a client certificate.

    Raises:
        SettingsError: Names the setting and what it should be.
        OSError: A file cannot be read.
    """
    if config.tls is not None:
        check_tls(config.tls)
    if isinstance(config, GrpcServerConfig) and config.health_listen is not None:
        split_address(config.health_listen)
    mutual = config.tls is not None and config.tls.client_ca_file is not None
    guarded = ApiKeys(config.api_keys, config.api_key_file).required or mutual
    check_exposure(config.listen, guarded=guarded, allow_no_api_key=config.allow_no_api_key)
    return guarded


def check_tls(tls: ServerTls) -> None:
    """Refuses TLS files that are not PEM.

    Raises:
        SettingsError: Names the file.
        OSError: A file cannot be read.
    """
    for name in ("cert_file", "key_file", "client_ca_file"):
        file = getattr(tls, name)
        if file is not None and b"-----BEGIN " not in file.read_bytes():
            raise SettingsError(f"--tls-{name.replace('_', '-')} {file} is not a PEM file.")


def check_exposure(listen: str, *, guarded: bool, allow_no_api_key: bool, option: str = "--listen") -> None:
    """Refuses to serve everyone on other machines, unless explicitly asked to.

    Args:
        listen: host:port.
        guarded: Whether callers need a key, or a client certificate.
        allow_no_api_key: Serve them anyway.
        option: The option with the address.

    Raises:
        SettingsError: Says what to do instead.
    """
    if not listens_on_loopback(listen) and not guarded and not allow_no_api_key:
        raise SettingsError(
            f"{option} {listen} is reachable from other machines, and there is no API key. Set GRADWIRE_API_KEY or "
            "--api-key-file, or pass --allow-no-api-key if something in front of Gradwire authenticates callers."
        )


def check_gateway_beside(config: TrainerConfig) -> None:
    """Refuses a gateway beside the trainer that could not reach it, or that would serve everyone.

    Raises:
        SettingsError: Says what to do instead.
    """
    if config.gateway_listen is None:
        return
    keys = bool(config.api_keys) or config.api_key_file is not None
    check_exposure(config.gateway_listen, guarded=keys, allow_no_api_key=config.allow_no_api_key, option="--gateway")
    if config.tls is not None:
        raise SettingsError(
            "--gateway is for a trainer without TLS; with it, run `gradwire gateway --trainer https://HOST:PORT`."
        )


def check_page(listen: str, *, guarded: bool) -> None:
    """Refuses to show the page to everyone on other machines, or without the packages it needs.

    Args:
        listen: host:port.
        guarded: Whether a key, or a client certificate, is required.

    Raises:
        SettingsError: Says what to do instead.
    """
    if not listens_on_loopback(listen) and not guarded:
        raise SettingsError(
            f"--page {listen} is reachable from other machines, and there is no API key. Set GRADWIRE_API_KEY or "
            "--api-key-file, or listen on 127.0.0.1 and forward the port (ssh -L)."
        )
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"--page needs {' and '.join(missing)}, which cannot be imported. Install it with "
            "`pip install 'gradwire[page]'`."
        )


def check_base_model(base_model: str) -> None:
    """Refuses a path that is not a folder, seconds before a worker could.

    Raises:
        SettingsError: It is not a folder.
    """
    if base_model.startswith(("/", "./", "../", "~")) and not os.path.isdir(base_model):
        raise SettingsError(
            f"--base-model {base_model} does not exist or is not a folder; give the folder of a Hugging Face "
            "model, or a hub id."
        )
