"""A gateway on this process's event loop, spoken to by hand over a real socket, in tinker's words."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from trainer_service.config import GatewayConfig
from trainer_service.gateway.app import make_app
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.trainers import Trainer, Trainers
from trainer_service.gateway.wire import tinker_wire_pb2 as wire
from trainer_service.http_server import HttpServer


@dataclass
class HttpGateway:
    """A gateway under test, and a client of it."""

    gateway: Gateway
    http: httpx.AsyncClient
    address: str

    async def post(self, path: str, key: str = "", /, **body: Any) -> Any:
        """What a call answers, which must be 200."""
        response = await self.http.post(f"/api/v1/{path}", json=body, headers={"x-api-key": key} if key else {})
        assert response.status_code == 200, response.text
        return response.json()

    async def session(self, key: str = "") -> str:
        """A new session's id."""
        return (await self.post("create_session", key))["session_id"]

    async def model(self, session_id: str, number: int = 0, key: str = "", **asked: Any) -> str:
        """A new model's id, once it is made."""
        asked = {"base_model": "fake", "lora_config": {"rank": 4}, **asked}
        future = await self.post("create_model", key, session_id=session_id, model_seq_id=number, **asked)
        assert (await self.result(future["request_id"], key)).json()["model_id"] == future["model_id"]
        return future["model_id"]

    async def result(self, request_id: str, key: str = "") -> httpx.Response:
        """What a future resolves to."""
        headers = {"x-api-key": key} if key else {}
        for _ in range(10):
            body = {"request_id": request_id, "allow_metadata_only": False}
            response = await self.http.post("/api/v1/retrieve_future", json=body, headers=headers)
            if response.status_code != 408:
                return response
        raise AssertionError(f"{request_id} is never answered")

    async def forward_backward(self, model_id: str, seq_id: int, key: str = "", **asked: Any) -> httpx.Response:
        """The answer to a pass over one datum, or what was asked instead."""
        headers = {"content-type": "application/x-protobuf", "x-sdk-method": "TrainingClient.forward_backward"}
        if key:
            headers["x-api-key"] = key
        return await self.http.post(
            "/api/v1/forward_backward", content=one_pass(model_id, seq_id, **asked), headers=headers
        )


def one_pass(model_id: str, seq_id: int, *, tokens: int = 3, weight: float = 1.0, **asked: Any) -> bytes:
    """A forward_backward over one datum."""
    asked = {"loss_fn": "cross_entropy", **asked}
    message = wire.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, **asked)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(tokens, dtype="<i4").tobytes()
    targets = np.arange(1, tokens + 1, dtype="<i8")
    datum.loss_fn_inputs["target_tokens"].CopyFrom(
        wire.Tensor(dense=targets.tobytes(), dtype=wire.DTYPE_INT64, shape=[tokens])
    )
    weights = np.full(tokens, weight, dtype="<f4")
    datum.loss_fn_inputs["weights"].CopyFrom(
        wire.Tensor(dense=weights.tobytes(), dtype=wire.DTYPE_FLOAT32, shape=[tokens])
    )
    return message.SerializeToString()


@contextlib.asynccontextmanager
async def http_gateway(address: str, folder: Path, **settings: Any) -> AsyncIterator[HttpGateway]:
    """A gateway before one trainer.

    Args:
        address: The trainer's.
        folder: Where the gateway's file is.
        **settings: Of GatewayConfig.
    """
    server = HttpServer("127.0.0.1:0", tls=None)
    gateway = Gateway(GatewayConfig(data_dir=folder, **settings), Trainers([Trainer(f"http://{address}")]))
    await server.start(make_app(gateway), stop_grace_s=2)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            yield HttpGateway(gateway, http, server.address)
    finally:
        gateway.end_polls()
        await server.stop()
        await gateway.close()
