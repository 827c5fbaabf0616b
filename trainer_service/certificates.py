"""Certificates that we make, for servers whose clients are given them. Ground floor."""

import datetime
import ipaddress
from collections.abc import Sequence

_VALID = datetime.timedelta(days=825)
"""Longer than a trainer job lives; some clients reject certificates that are valid for longer."""
_EARLIER = datetime.timedelta(hours=1)
"""For clients whose clocks are behind."""


def make_certificate(hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """(certificate, private key), both PEM; self-signed, so that whoever trusts it trusts nothing else.

    Args:
        hosts: Names and addresses clients will call it by; the first is its subject.
    """
    # Loaded only where a certificate is made.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name_of(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    key = ec.generate_private_key(ec.SECP256R1())
    # A common name has at most 64 characters; clients check the alternative names.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([name_of(host) for host in dict.fromkeys(hosts)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def first_name(certificate: bytes) -> str:
    """The first host of a server's certificate.

    Args:
        certificate: PEM; the first one if there are several.

    Raises:
        ValueError: It names none.
    """
    from cryptography import x509

    parsed = x509.load_pem_x509_certificate(certificate)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = ()
    for name in names:
        return str(name.value)
    raise ValueError("The certificate has no subject alternative name, so clients accept it for no host.")
