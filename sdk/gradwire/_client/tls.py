"""PEM files of a client that speaks TLS."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class ClientTls:
    """PEM files of a client that speaks TLS."""

    ca_file: Path | None = None
    """Roots the server's certificate must come from; None takes the system's."""
    cert_file: Path | None = None
    """Certificate shown to a server that asks for one, and those between it and its root; None shows none."""
    key_file: Path | None = None
    """The certificate's private key."""

    @staticmethod
    def from_environment() -> "ClientTls":
        """GRADWIRE_TLS_CA_FILE, GRADWIRE_TLS_CERT_FILE and GRADWIRE_TLS_KEY_FILE."""

        def path(name: str) -> Path | None:
            value = os.environ.get(f"GRADWIRE_TLS_{name}_FILE")
            return Path(value) if value else None

        return ClientTls(ca_file=path("CA"), cert_file=path("CERT"), key_file=path("KEY"))

    def credentials(self) -> grpc.ChannelCredentials:
        """What grpc connects with.

        Raises:
            ValueError: A certificate without its key, or the other way round; a file that holds neither.
            OSError: A file cannot be read.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError(
                "A client certificate needs both cert_file and key_file, or GRADWIRE_TLS_CERT_FILE and "
                "GRADWIRE_TLS_KEY_FILE."
            )
        ca, key, cert = (
            None if file is None else file.read_bytes() for file in (self.ca_file, self.key_file, self.cert_file)
        )
        _check_pem(self, ca)
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def _check_pem(tls: ClientTls, ca: bytes | None) -> None:
    """Says what is wrong with PEM files; grpc would only say, and only when it connects, that it cannot."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Whether a key is long enough is for the server to judge.
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    try:
        if ca is not None:
            context.load_verify_locations(cadata=ca.decode("ascii", "ignore"))
    except ssl.SSLError as exc:
        raise ValueError(f"ca_file {tls.ca_file} has no PEM certificate in it.") from exc
    # What a shell hands over as a pipe can be read only once.
    if tls.cert_file is None or tls.key_file is None or not (tls.cert_file.is_file() and tls.key_file.is_file()):
        return
    try:
        # Without a password it would be asked for on the terminal.
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except ssl.SSLError as exc:
        raise ValueError(
            f"cert_file {tls.cert_file} and key_file {tls.key_file} are not a PEM certificate and its private key; "
            "the key must not be encrypted."
        ) from exc
