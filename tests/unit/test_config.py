"""Settings, and what the command line says of those that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer_service.addresses import split_address
from trainer_service.command_lines import SettingsError
from trainer_service.config import Limits, NodeConfig
from trainer_service.startup_checks import check_exposure, read_api_keys, read_umask

NODES = ("--nnodes", "2", "--rdzv-endpoint")
TOKEN = ("--join-token-file", "/proc/sys/kernel/random/boot_id")
SHORT_TOKEN = ("--join-token-file", "/proc/sys/kernel/ostype")


def test_limits_are_those_announced():
    limits = Limits()
    assert (limits.max_message_bytes, limits.target_message_bytes) == (64 << 20, 1 << 20)
    assert (limits.max_in_flight_operations, limits.max_runs) == (64, 8)
    assert (limits.max_datums, limits.max_tokens) == (65_536, 4_194_304)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:7777", ("127.0.0.1", 7777)), ("localhost:0", ("localhost", 0)), ("[::1]:80", ("::1", 80))],
)
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["7777", ":7777", "host:", "host:http", "host:99999"])
def test_an_address_without_either_is_refused(address: str):
    with pytest.raises(SettingsError, match='must be "host:port"'):
        split_address(address)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0", "127.8.0.1:0"])
def test_loopback_needs_no_key(listen: str):
    check_exposure(listen, guarded=False, allow_no_api_key=False)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.0.0.7:1", "trainer.example:1"])
def test_other_addresses_need_a_key_or_a_word(listen: str):
    with pytest.raises(SettingsError, match="GRADWIRE_API_KEY or --api-key-file, or pass --allow-no-api-key"):
        check_exposure(listen, guarded=False, allow_no_api_key=False)
    check_exposure(listen, guarded=True, allow_no_api_key=False)
    check_exposure(listen, guarded=False, allow_no_api_key=True)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADWIRE_API_KEY", "third, ops fourth admin,third,")
    assert read_api_keys() == ("third", "ops fourth admin")
    monkeypatch.delenv("GRADWIRE_API_KEY")
    assert read_api_keys() == ()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "--base-model", "m", "--listen", "0.0.0.0:0"], "there is no API key"),
        (["jobs", "--listen", "0.0.0.0:0"], "there is no API key"),
        (["gateway", "--listen", "0.0.0.0:0"], "--listen 0.0.0.0:0 is reachable from other machines"),
        (["serve", "--base-model", "m", "--gateway", "0.0.0.0:0"], "--gateway 0.0.0.0:0 is reachable from other"),
        (["jobs", "--kubernetes-name", "x"], "--kubernetes-template must be given too"),
        (["jobs", "--kubernetes-template", "x"], "are options of --backend kubernetes"),
        (["jobs", "--backend", "kubernetes"], "needs --kubernetes-template"),
        (["serve", "--base-model", "m", "--tls-cert-file", __file__], "--tls-key-file must be given too"),
        (["serve", "--base-model", "m", "--tls-cert-file", __file__, "--tls-key-file", __file__], "not a PEM file"),
        (["serve", "--base-model", "m", "--api-key-file", "/dev/null"], "is not a regular file"),
        (["serve", "--base-model", "m", "--api-key-file", "no/such"], "No such file"),
        (["serve", "--base-model", "m", "--listen", "nowhere"], 'must be "host:port"'),
        (["serve", "--base-model", "./no/such/folder"], "--base-model ./no/such/folder does not exist"),
        (["serve", "--base-model", "m", "--storage-url", "nope://x"], "--storage-url: nope://x cannot be used"),
        (["jobs", "--storage-url", "nope://x"], "--storage-url: nope://x cannot be used as a store"),
        (["serve", "--base-model", "m", "--listen", "192.0.2.1:1", "--allow-no-api-key"], "cannot listen on"),
        (["serve", "--base-model", "m", "--nproc-per-node", "2", "--fsdp-size", "3"], "is 3, and there are 2 ranks"),
        (["serve", "--base-model", "m", "--tp-size", "2"], "it must divide them: one of 1."),
        (["serve", "--base-model", "m", "--ep-size", "2"], "lie in parts on 1 rank (--fsdp-size); it must"),
        (["serve", "--base-model", "m", "--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        (["serve", "--base-model", "m", "--rdzv-endpoint", "127.0.0.1:1"], "are for several nodes; add --nnodes"),
        (["serve", "--base-model", "m", *NODES, "127.0.0.1:1"], "set GRADWIRE_JOIN_TOKEN or --join-token-file"),
        (["serve", "--base-model", "m", *NODES, "127.0.0.1:1", *SHORT_TOKEN], "must be 16 or more printable ASCII"),
        (["serve", "--base-model", "m", *NODES, "0.0.0.0:1", *TOKEN], "0.0.0.0 is every interface; give the address"),
        (["serve", "--base-model", "m", *NODES, "192.0.2.1:1", *TOKEN], "is not an address of this machine"),
        (["worker", "--join", "127.0.0.1:1", *TOKEN], "--node-rank must be given, from 1; 0 is the trainer's machine"),
    ],
)
def test_settings_that_cannot_be_end_with_a_sentence_and_code_2(arguments: list[str], text: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "trainer_service", *arguments],
        env={**os.environ, "GRADWIRE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("gradwire: ")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1
    assert text in said[0]
    assert "Traceback" not in done.stderr


def test_a_pod_of_an_indexed_job_knows_its_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "6")
    assert NodeConfig(join="127.0.0.1:1").node_rank == 7, "pods count from 0, and the trainer's machine is 0"
    assert NodeConfig(join="127.0.0.1:1", node_rank=2).node_rank == 2


@pytest.mark.parametrize(("given", "umask"), [(None, 0o077), ("", 0o077), ("027", 0o027), ("0", 0), ("0022", 0o022)])
def test_files_are_their_owner_s_alone_unless_a_umask_says_otherwise(
    given: str | None, umask: int, monkeypatch: pytest.MonkeyPatch
):
    if given is None:
        monkeypatch.delenv("GRADWIRE_UMASK", raising=False)
    else:
        monkeypatch.setenv("GRADWIRE_UMASK", given)
    assert read_umask() == umask


@pytest.mark.parametrize("given", ["rwx", "-1", "1777", "8", "0o77"])
def test_a_umask_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADWIRE_UMASK", given)
    with pytest.raises(SettingsError, match="octal"):
        read_umask()
