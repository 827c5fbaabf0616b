"""Certificates for tests of TLS."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Pem:
    """Paths of PEM files: a root, certificate and key of a server and of a client from it, and somebody else's root."""

    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: Path
    strangers_client: tuple[Path, Path]


def make_pem(folder: Path) -> Pem:
    """Writes them; the server is 127.0.0.1 and localhost."""

    def write(name: str, *blobs: trustme.Blob) -> Path:
        path = folder / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return path

    def pair(name: str, cert: trustme.LeafCert) -> tuple[Path, Path]:
        return write(f"{name}.crt", *cert.cert_chain_pems), write(f"{name}.key", cert.private_key_pem)

    ours, theirs = trustme.CA(), trustme.CA()
    return Pem(
        ca=write("ca.pem", ours.cert_pem),
        server=pair("server", ours.issue_cert("127.0.0.1", "localhost")),
        client=pair("client", ours.issue_cert("alice@example.org")),
        stranger=write("stranger.pem", theirs.cert_pem),
        strangers_client=pair("strangers-client", theirs.issue_cert("mallory@example.org")),
    )
