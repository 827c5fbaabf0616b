"""TLS on the jobs control plane and on the trainers it starts, with its own certificate or one made for each job."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from gradwire import ClientTls, ServiceClient, TrainerJobConfig, TrainerJobManager
from gradwire.errors import InvalidArgumentError, UnauthenticatedError, UnavailableError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.jobs_process import API_KEY, running_jobs
from tests.listening import free_port
from tests.pem import Pem, make_pem
from trainer_service.certificates import first_name, make_certificate


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    return make_pem(tmp_path_factory.mktemp("pem"))


def test_trainers_show_the_control_planes_certificate(pem: Pem, tmp_path: Path):
    ours, theirs = ClientTls(ca_file=pem.ca), ClientTls(ca_file=pem.stranger)
    health_address = f"127.0.0.1:{free_port()}"
    pair = [str(path) for path in pem.server]
    with running_jobs(tmp_path, tls=pair, health_listen=health_address) as (_, base_url):
        with TrainerJobManager("no-key", base_url=base_url, tls=ours) as stranger, pytest.raises(UnauthenticatedError):
            stranger.list()
        misled = TrainerJobManager(API_KEY, base_url=base_url, tls=theirs)
        with misled, pytest.raises(UnavailableError, match="root"):
            misled.list()
        with TrainerJobManager(API_KEY, base_url=base_url, tls=ours) as manager:
            job = manager.create_and_wait(TrainerJobConfig("quick"))
            assert job.base_url.startswith("https://")
            assert job.tls is None, "its root is known"
            assert status_message(job.base_url, ours) == "loading the model"
        with grpc.insecure_channel(health_address) as channel:
            asked = health_pb2.HealthCheckRequest(service="gradwire.v1.TrainerJobService")
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(asked, timeout=10).status == health_pb2.HealthCheckResponse.SERVING


def status_message(base_url: str, tls: ClientTls | None) -> str:
    with ServiceClient(base_url, API_KEY, tls=tls) as service:
        return service.get_server_info(timeout_s=20).status_message


def test_a_job_is_made_a_certificate_that_its_owner_is_handed(tmp_path: Path):
    with (
        running_jobs(tmp_path, make_certificates=True) as (_, base_url),
        TrainerJobManager(API_KEY, base_url=base_url) as manager,
    ):
        one, other = (manager.create_and_wait(TrainerJobConfig("quick")) for _ in range(2))
        assert status_message(one.base_url, one.tls) == "loading the model"
        with pytest.raises(UnavailableError, match="root"):
            status_message(one.base_url, other.tls)
        assert len(list(tmp_path.glob("data/jobs/*/tls.key"))) == 2
        for job in (one, other):
            manager.delete(job.job_id)
        assert list(tmp_path.glob("data/jobs/*/tls.key")) == [], "a private key outlives no job"


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("accelerator_type", TrainerJobConfig("quick", accelerator_type="NVIDIA-H200")),
        ("accelerator_type", TrainerJobConfig("quick", accelerator_type="no label")),
        ("accelerator_type", TrainerJobConfig("quick", accelerator_type="x" * 64)),
        ("accelerator_count", TrainerJobConfig("quick", accelerator_count=8)),
        ("node_count", TrainerJobConfig("quick", node_count=2)),
    ],
)
def test_what_a_trainer_here_cannot_have_is_refused_in_a_sentence(jobs_url: str, field: str, config: TrainerJobConfig):
    with TrainerJobManager(API_KEY, base_url=jobs_url) as manager:
        with pytest.raises(InvalidArgumentError, match=rf"{field} is .*(must be|leave it empty)"):
            manager.create(config)
        assert manager.list() == []


@pytest.fixture(scope="module")
def jobs_url(tmp_path_factory: pytest.TempPathFactory):
    with running_jobs(tmp_path_factory.mktemp("jobs")) as (_, base_url):
        yield base_url


def test_a_certificate_is_for_each_host_it_names():
    certificate, key = make_certificate(["job-x.training.svc", "127.0.0.1"])
    assert first_name(certificate) == "job-x.training.svc"
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_roots_as_text_and_as_a_file_are_not_taken_together(pem: Pem):
    with pytest.raises(ValueError, match="ca_file and ca_pem"):
        ClientTls(ca_file=pem.ca, ca_pem="x").credentials()
    with pytest.raises(ValueError, match="ca_pem has no PEM"):
        ClientTls(ca_pem="x").credentials()
