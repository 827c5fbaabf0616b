"""TLS and mutual TLS from PEM files, on the trainer, in the SDK, and by grpcurl."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gradwire import ServiceClient
from gradwire._client.tls import ClientTls
from gradwire._client.transport import Connection
from gradwire.errors import UnauthenticatedError, UnavailableError

from tests.front_end import front_end_on_a_thread
from tests.pem import Pem, make_pem
from trainer_service.config import ServerTls


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    return make_pem(tmp_path_factory.mktemp("pem"))


def server_tls(pem: Pem, *, mutual: bool = False) -> ServerTls:
    return ServerTls(cert_file=pem.server[0], key_file=pem.server[1], client_ca_file=pem.ca if mutual else None)


def client_tls(ca: Path, pair: tuple[Path, Path] | tuple[None, None] = (None, None)) -> ClientTls:
    return ClientTls(ca_file=ca, cert_file=pair[0], key_file=pair[1])


def ask(address: str, *, scheme: str = "https", timeout_s: float = 10, **arguments: Any) -> bool:
    with ServiceClient(f"{scheme}://{address}", **arguments) as service:
        return service.get_server_info(timeout_s=timeout_s).ready


def test_a_client_that_trusts_the_root_trains_over_tls_and_the_key_is_still_asked_for(pem: Pem):
    with front_end_on_a_thread(tls=server_tls(pem), api_keys=("alice secret",)) as trainer:
        with ServiceClient(f"https://{trainer.address}", "secret", tls=client_tls(pem.ca)) as service:
            client = service.create_training_client()
            client.zero_grad().result(60)
        with pytest.raises(UnauthenticatedError):
            ask(trainer.address, tls=client_tls(pem.ca))


def test_the_environment_names_the_files_too(pem: Pem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADWIRE_TLS_CA_FILE", str(pem.ca))
    monkeypatch.setenv("GRADWIRE_TLS_CERT_FILE", str(pem.client[0]))
    monkeypatch.setenv("GRADWIRE_TLS_KEY_FILE", str(pem.client[1]))
    with front_end_on_a_thread(tls=server_tls(pem, mutual=True)) as trainer:
        assert ask(trainer.address)


def test_a_server_of_another_root_and_plaintext_are_not_spoken_to(pem: Pem):
    with front_end_on_a_thread(tls=server_tls(pem)) as trainer:
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="no Gradwire server answers at https://.*root"):
            ask(trainer.address, tls=client_tls(pem.stranger), timeout_s=60)
        # What no waiting makes good is not tried again, as a server that is away is for 20 s.
        assert time.monotonic() - start < 10
        with pytest.raises(UnavailableError):
            ask(trainer.address, scheme="http", timeout_s=1)


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_mutual_tls_lets_in_only_those_with_a_certificate_of_the_root(pem: Pem, who: str):
    pair = (None, None) if who == "nobody" else pem.strangers_client
    with front_end_on_a_thread(tls=server_tls(pem, mutual=True)) as trainer:
        with pytest.raises(UnavailableError):
            ask(trainer.address, tls=client_tls(pem.ca, pair), timeout_s=1)
        assert ask(trainer.address, tls=client_tls(pem.ca, pem.client))


def test_pem_files_with_a_plaintext_url_and_half_a_pair_are_refused(pem: Pem):
    with pytest.raises(ValueError, match="is plaintext, but TLS files were given"):
        Connection("http://127.0.0.1:1", tls=client_tls(pem.ca))
    with pytest.raises(ValueError, match="both cert_file and key_file"):
        Connection("https://127.0.0.1:1", tls=ClientTls(cert_file=pem.client[0]))
    with pytest.raises(FileNotFoundError):
        Connection("https://127.0.0.1:1", tls=ClientTls(ca_file=Path("no/such.pem")))


def test_the_readmes_grpcurl_lines_for_a_key_and_tls_work(pem: Pem):
    readme = (Path(__file__).parents[2] / "docs" / "grpcurl.md").read_text()
    script = readme.split("<!-- run by tests/wire/test_tls.py -->")[1].split("```bash\n")[1].split("```")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with front_end_on_a_thread(tls=server_tls(pem, mutual=True), api_keys=("alice secret",)) as trainer:
        for name, text in {
            "127.0.0.1:7777": trainer.address,
            "ca.pem": str(pem.ca),
            "client.crt": str(pem.client[0]),
            "client.key": str(pem.client[1]),
        }.items():
            assert name in script
            script = script.replace(name, text)
        for key, code in (("secret", 0), ("wrong", 1)):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                env={**os.environ, "PATH": path, "GRADWIRE_API_KEY": key},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (done.returncode != 0) == bool(code), done.stdout + done.stderr
            assert ('"ready": true' in done.stdout) != bool(code)
