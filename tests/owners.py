"""Keys of several owners, and how a call made with one is refused."""

from typing import Any

import grpc
import grpc.aio
import pytest
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1 import trainer_service_pb2 as pb

from tests.front_end import FrontEnd


async def error_of(call: Any) -> GradwireError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def with_key(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


KEYS = ("alice alices-key", "bob bobs-key", "ops ops-key admin")
ALICE, BOB, OPS = (with_key(key) for key in ("alices-key", "bobs-key", "ops-key"))


async def create(trainer: FrontEnd, metadata: Any, **fields: Any) -> str:
    return (await trainer.stub.CreateRun(pb.CreateRunRequest(**fields), metadata=metadata)).run.run_id


def without_id(exc: GradwireError, run_id: str) -> tuple[Any, ...]:
    metadata = {key: value.replace(run_id, "RUN") for key, value in exc.metadata.items()}
    return exc.reason, exc.code, exc.message.replace(run_id, "RUN"), metadata
