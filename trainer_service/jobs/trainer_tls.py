"""The certificates of the control plane's trainers: its own, or one made for the job."""

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from trainer_service.certificates import first_name, make_certificate

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104  (recognised, not listened on)


@dataclass(frozen=True)
class TrainerTls:
    """Certificate and key of one trainer on this machine."""

    cert_file: Path
    key_file: Path
    certificate: str = ""
    """PEM for the job's owner to trust; "" if a root that clients know has signed it."""

    @staticmethod
    def make(folder: Path, host: str) -> "TrainerTls":
        """A new pair, kept in the job's folder.

        Args:
            folder: The job's folder.
            host: What the trainer listens on.

        Raises:
            OSError: It cannot be written.
        """
        certificate, key = make_certificate(_names_of(host))
        files = folder / "tls.crt", folder / "tls.key"
        for path, pem in zip(files, (certificate, key), strict=True):
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(pem)
        return TrainerTls(*files, certificate=certificate.decode())

    @property
    def arguments(self) -> list[str]:
        """Options for `gradwire serve`."""
        return ["--tls-cert-file", str(self.cert_file), "--tls-key-file", str(self.key_file)]

    def channel(self, address: str, options: Sequence[tuple[str, str | int]]) -> grpc.aio.Channel:
        """A channel that trusts exactly this certificate, by whatever name we reach the trainer."""
        pem = self.cert_file.read_bytes()
        override = ("grpc.ssl_target_name_override", first_name(pem))
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem), [*options, override])


def _names_of(host: str) -> list[str]:
    """Names by which clients may reach a server that listens on `host`."""
    if host not in _WILDCARDS:
        return [host]
    names = [socket.gethostname(), socket.getfqdn()]
    # A host whose name does not resolve is reached by an address that only its clients know.
    with contextlib.suppress(OSError):
        names += [str(one[4][0]) for one in socket.getaddrinfo(names[0], None)]
    return [*names, "localhost", "127.0.0.1", "::1"]
