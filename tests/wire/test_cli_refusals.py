"""gradwire with TLS, with what is wrong, and with nobody there: one sentence, an exit code, never a traceback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from gradwire import __version__

from tests.cli import gradwire, refusal
from tests.front_end import FrontEnd, front_end_on_a_thread
from tests.pem import Pem, make_pem
from trainer_service.config import ServerTls
from trainer_service.paths import STATE, CheckpointPath

NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    return make_pem(tmp_path_factory.mktemp("pem"))


@pytest.fixture(scope="module")
def mutual(pem: Pem) -> Iterator[str]:
    """Where a trainer is that asks for a client certificate."""
    tls = ServerTls(cert_file=pem.server[0], key_file=pem.server[1], client_ca_file=pem.ca)
    with front_end_on_a_thread(tls=tls) as trainer:
        trainer.worker.save(CheckpointPath("run-1", STATE, "kept"), 1000)
        yield f"https://{trainer.address}"


@pytest.fixture(scope="module")
def trainer() -> Iterator[FrontEnd]:
    with front_end_on_a_thread(api_keys=("alice secret",)) as made:
        yield made


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwire.cli._CONNECT_TIMEOUT_S", 0.3)


def pair(cert: Path, key: Path) -> list[str]:
    return ["--tls-cert-file", str(cert), "--tls-key-file", str(key)]


def test_tls_options_open_a_trainer_that_asks_for_a_certificate(mutual: str, pem: Pem, tmp_path: Path):
    options = ["--tls-ca-file", pem.ca, *pair(*pem.client)]
    assert "gradwire://run-1/state/kept" in gradwire(mutual, "checkpoints", "list", *options).stdout
    gradwire(mutual, "checkpoints", "download", "gradwire://run-1/state/kept", tmp_path, *options)
    assert (tmp_path / "zeros").read_bytes() == bytes(1000)


def test_tls_options_open_a_trainer_that_asks_for_none(pem: Pem):
    with front_end_on_a_thread(tls=ServerTls(cert_file=pem.server[0], key_file=pem.server[1])) as trainer:
        url = f"https://{trainer.address}"
        assert gradwire(url, "runs", "list", "--tls-ca-file", pem.ca).stdout.startswith("RUN ")
        assert "its certificate does not come from a root trusted here" in refusal(url, "runs", "list")
        plain = refusal(f"http://{trainer.address}", "runs", "list")
        assert "it may want https://" in plain


def test_options_go_before_the_environment_and_a_pair_is_not_mixed(
    mutual: str, pem: Pem, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GRADWIRE_TLS_CA_FILE", str(pem.ca))
    monkeypatch.setenv("GRADWIRE_TLS_CERT_FILE", str(pem.client[0]))
    monkeypatch.setenv("GRADWIRE_TLS_KEY_FILE", str(pem.client[1]))
    gradwire(mutual, "runs", "list")
    gradwire(mutual, "runs", "list", "--tls-ca-file", pem.ca)
    monkeypatch.setenv("GRADWIRE_TLS_CA_FILE", str(pem.stranger))
    gradwire(mutual, "runs", "list", "--tls-ca-file", pem.ca)
    monkeypatch.setenv("GRADWIRE_TLS_CERT_FILE", str(pem.strangers_client[0]))
    monkeypatch.setenv("GRADWIRE_TLS_KEY_FILE", str(pem.strangers_client[1]))
    gradwire(mutual, "runs", "list", "--tls-ca-file", pem.ca, *pair(*pem.client))
    assert "both --tls-cert-file and --tls-key-file" in refusal(
        mutual, "runs", "list", "--tls-ca-file", pem.ca, "--tls-cert-file", pem.client[0], code=2
    )


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_a_trainer_lets_in_nobody_without_a_certificate_of_its_root(mutual: str, pem: Pem, who: str):
    options = pair(*pem.strangers_client) if who == "stranger" else []
    said = refusal(mutual, "runs", "list", "--tls-ca-file", pem.ca, *options)
    assert "it may want a client certificate" in said


def test_pem_files_that_cannot_be_used_are_refused_before_anything_is_sent(pem: Pem, tmp_path: Path):
    def said(*options: object, url: str = "https://127.0.0.1:1") -> str:
        return refusal(url, "runs", "list", *options, code=2)

    missing, nonsense = tmp_path / "missing.pem", tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for option in ("--tls-cert-file", "--tls-key-file"):
        assert "needs both --tls-cert-file and --tls-key-file" in said(option, pem.ca)
    for options in (["--tls-ca-file", missing], pair(missing, pem.client[1]), pair(pem.client[0], missing)):
        assert said(*options) == f"{missing}: No such file or directory."
    assert said("--tls-ca-file", tmp_path) == f"{tmp_path}: Is a directory."
    assert said("--tls-ca-file", nonsense) == f"ca_file {nonsense} has no PEM certificate in it."
    assert "are not a PEM certificate and its private key" in said(*pair(pem.client[0], nonsense))
    assert "are not a PEM certificate and its private key" in said(*pair(pem.client[0], pem.server[1]))
    assert "is plaintext, but TLS files were given" in said("--tls-ca-file", pem.ca, url=NOBODY)
    assert "is plaintext, but TLS files were given" in said(*pair(*pem.client), url=NOBODY)


def test_a_key_that_comes_through_a_pipe_is_read_once(mutual: str, pem: Pem, tmp_path: Path):
    # What a shell makes of <(…).
    read, write = os.pipe()
    os.write(write, pem.client[1].read_bytes())
    os.close(write)
    try:
        gradwire(mutual, "runs", "list", "--tls-ca-file", pem.ca, *pair(pem.client[0], Path(f"/dev/fd/{read}")))
    finally:
        os.close(read)


def test_an_encrypted_key_is_refused_without_asking_for_its_password(pem: Pem, tmp_path: Path):
    encrypted = tmp_path / "encrypted.key"
    key = serialization.load_pem_private_key(pem.client[1].read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    said = refusal("https://127.0.0.1:1", "runs", "list", *pair(pem.client[0], encrypted), code=2)
    assert "must not be encrypted" in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host:1", 'has scheme "ftp"'),
        ("", "names no host"),
        ("host", "names no port"),
        ("http://[::1", "is not a URL"),
        ("http://host:99999", "has an invalid port"),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, said: str):
    assert f"base_url {url!r} {said}" in refusal(url, "runs", "list", code=2)


def test_a_key_that_cannot_be_sent_and_one_that_does_not_fit_are_refused(
    trainer: FrontEnd, monkeypatch: pytest.MonkeyPatch
):
    url = f"http://{trainer.address}"
    monkeypatch.delenv("GRADWIRE_API_KEY", raising=False)
    gradwire(url, "runs", "list", "--api-key", "secret")
    assert "API key" in refusal(url, "runs", "list", "--api-key", "wrong")
    assert "API key" in refusal(url, "runs", "list")
    assert "stray newline" in refusal(url, "runs", "list", "--api-key", "secret\n", code=2)


def test_nobody_there_is_told_soon_and_names_the_address():
    assert f"no Gradwire server answers at {NOBODY} (" in refusal(NOBODY, "runs", "list")


@pytest.mark.parametrize(
    "verb", [["checkpoints", "show"], ["checkpoints", "download"], ["checkpoints", "delete"], ["export"]]
)
def test_a_path_that_is_none_and_one_of_nothing_are_refused(
    verb: list[str], trainer: FrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for path in ("final", "gradwire://run-1/state", "gradwire://run-1/state/..", "/etc/passwd", ""):
        said = refusal(f"http://{trainer.address}", *verb, path, "--api-key", "secret")
        assert said.startswith(f"path is {path!r}; it must be gradwire://<run_id>/")
    path = "gradwire://run-1/sampler_weights/none"
    assert f"There is no checkpoint {path}" in refusal(f"http://{trainer.address}", *verb, path, "--api-key", "secret")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["runs"],
        ["runs", "show"],
        ["runs", "nonsense"],
        ["runs", "fork", "run-1", "--step", "-1"],
        ["runs", "fork", "run-1", "--step", "one"],
        ["runs", "fork", "run-1", "--step", str(1 << 64)],
        ["runs", "show", "\udcff"],
        ["runs", "fork", "run-1", "--name", "\udcff"],
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(arguments: list[str]):
    assert "gradwire" in gradwire(NOBODY, *arguments, code=2).stderr


def test_the_version_is_told():
    assert gradwire(NOBODY, "--version").stdout == f"gradwire {__version__}\n"


def test_a_reader_that_has_seen_enough_is_not_complained_of(trainer: FrontEnd):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gradwire.cli", "checkpoints", "list", "--api-key", "secret"],
            env={**os.environ, "GRADWIRE_BASE_URL": f"http://{trainer.address}"},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
