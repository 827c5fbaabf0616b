"""From create_and_wait through a StatefulSet to a trained step and delete, with the rights of the chart's Role."""

from pathlib import Path

import gradwire
import pytest
from gradwire import ServiceClient, TrainerJobConfig, TrainerJobManager

from tests.kubernetes.cluster import Cluster, eventually
from tests.kubernetes.control_plane import KEYS, install, running_control_plane
from tests.kubernetes.kubelet import FakeKubelet

ADAM = gradwire.AdamParams(learning_rate=1e-2)


def datum() -> gradwire.Datum:
    return gradwire.datum_from_tokens_weights(list(range(1, 13)), [1.0] * 12)


def step(client: gradwire.TrainingClient) -> float:
    """The loss before a step."""
    loss = client.forward_backward([datum()], "cross_entropy").result(100).metrics["loss:sum"]
    client.optim_step(ADAM).result(100)
    return loss


@pytest.mark.timeout(300)
def test_a_job_trains_survives_its_pod_and_the_control_plane_and_is_deleted_whole(
    cluster: Cluster,
    namespace: str,
    helm: Path,
    kubelet: FakeKubelet,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    release = install(cluster, helm, namespace, tmp_path, {"service": {"type": "NodePort"}})
    before = cluster.everything(namespace)
    with (
        running_control_plane(release, tmp_path, "--make-certificates") as base_url,
        TrainerJobManager(KEYS["ops"], base_url=base_url) as manager,
    ):
        job = manager.create_and_wait(TrainerJobConfig("/models/tiny_llama", display_name="first"), timeout_s=100)
    assert "loading the model" in capfd.readouterr().err
    assert job.base_url.startswith("https://127.0.0.1:")
    assert cluster.everything(namespace) - before == {
        *(f"{kind}/{job.job_id}" for kind in ("services", "secrets", "statefulsets")),
        f"pods/{job.job_id}-0",
        f"persistentvolumeclaims/data-{job.job_id}-0",
    }

    with ServiceClient(job.base_url, KEYS["ops"], tls=job.tls) as service:
        client = service.create_training_client(lora_rank=4)
        losses = [step(client) for _ in range(3)]
        assert losses[-1] < losses[0]
        # In mid-step: what was sent is in the journal, on the volume that the pod's next container finds.
        under_way = [client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)]
        kubelet.kill(f"{job.job_id}-0")
        for future in under_way:
            future.result(100)
        # And the pod as a whole, as when its node is drained.
        cluster.delete("v1", "pods", f"{job.job_id}-0", namespace)
        assert step(client) < losses[-1]
        assert client.get_info().step == 5

    # Another control plane finds the job by its label.
    with (
        running_control_plane(release, tmp_path, "--make-certificates") as base_url,
        TrainerJobManager(KEYS["ops"], base_url=base_url) as manager,
    ):
        (found,) = manager.list()
        assert (found.job_id, found.job_name, found.base_url) == (job.job_id, job.job_name, job.base_url)
        assert found.ca_certificate == job.ca_certificate
        manager.wait(found.job_id, timeout_s=100)
        manager.delete(job.job_id)
        assert manager.list() == []
    eventually(lambda: cluster.everything(namespace) == before)
