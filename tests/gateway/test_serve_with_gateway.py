"""`gradwire serve --gateway`: one command for one machine."""

import socket
from pathlib import Path

import tinker

from tests.gateway.conftest import KEY
from tests.gateway.data import make_data
from tests.trainer_process import running_trainer


def test_a_trainer_brings_its_gateway_along(tiny_llama: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with running_trainer(tiny_llama, tmp_path, "--gateway", address, forked=True) as trainer:
        trainer.wait_ready()
        with tinker.ServiceClient(base_url=f"http://{address}", api_key=KEY) as service:
            client = service.create_lora_training_client(str(tiny_llama), rank=2).result()
            assert client.forward(make_data(), "cross_entropy").result().metrics["loss:sum"] > 0
