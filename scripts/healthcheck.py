"""Asks a Gradwire server for its health over gRPC: exit code 0 when it serves, 1 and a sentence when it does not.

    python scripts/healthcheck.py [--address 127.0.0.1:7777] [--service gradwire.v1.TrainerService]

Service "" asks whether the process lives, "gradwire.v1.TrainerService" whether the model is loaded and the trainer
takes work, "gradwire.v1.TrainerJobService" whether a control plane does.
"""

import argparse
import os
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def fault(address: str, service: str, timeout_s: float) -> str | None:
    """Why the server does not serve, in a sentence; None when it does."""
    # A proxy of the environment has no business between a probe and what it probes.
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as exc:
            call: Any = exc
            return f"{address} gave no health of {service!r}: {call.code().name}, {call.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return f"{address} says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)} of {service!r}."
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    address = os.environ.get("GRADWIRE_HEALTH_ADDRESS", "127.0.0.1:7777")
    service = os.environ.get("GRADWIRE_HEALTH_SERVICE", "gradwire.v1.TrainerService")
    parser.add_argument("--address", default=address, help="default: $GRADWIRE_HEALTH_ADDRESS or %(default)s")
    parser.add_argument("--service", default=service, help="default: $GRADWIRE_HEALTH_SERVICE or %(default)s")
    parser.add_argument("--timeout-s", type=float, default=4.0)
    args = parser.parse_args()
    sys.exit(fault(args.address, args.service, args.timeout_s))


if __name__ == "__main__":
    main()
