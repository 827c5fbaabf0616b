"""A trainer's outside without its inside, for tests of trainer jobs: `python -m tests.fake_trainer --base-model=…`.

The base model's name says what it does: "quick" gets ready at once, "loading" never, "broken" ends with a sentence,
"silent" ends without one, "deaf" does not hear SIGTERM, "dies" gets ready and ends when it is asked to delete a run,
"tells" ends with a sentence about a folder of the host.
"""

import argparse
import os
import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from gradwire._wire.protocol_version import PROTOCOL_VERSION
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceServicer, add_TrainerServiceServicer_to_server
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trainer_service.access import ApiKeys
from trainer_service.processes import write_ready_file
from trainer_service.startup_checks import read_api_keys


class Servicer(TrainerServiceServicer):
    """Says what it is doing, to those who have the key."""

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour

    def DeleteRun(self, request: pb.DeleteRunRequest, context: grpc.ServicerContext) -> pb.DeleteRunResponse:
        assert self._behaviour == "dies"
        os._exit(7)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        metadata = {item[0]: str(item[1]) for item in context.invocation_metadata()}
        if not ApiKeys(read_api_keys()).find(metadata.get("authorization", "").removeprefix("Bearer ")):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        return pb.GetServerInfoResponse(
            status_message="loading the model", min_protocol_version=1, max_protocol_version=PROTOCOL_VERSION
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-model")
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--tls-cert-file", type=Path)
    parser.add_argument("--tls-key-file", type=Path)
    args, _ = parser.parse_known_args()
    if args.base_model == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.base_model == "broken":
        print("looking for it\ngradwire: There is no model at broken.", file=sys.stderr)
        sys.exit(1)
    if args.base_model == "tells":
        print(f"gradwire: {args.ready_file} is not what it should be; see https://example.org/x.", file=sys.stderr)
        sys.exit(1)
    if args.base_model == "silent":
        sys.exit(3)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    checks = health.HealthServicer()
    ready = args.base_model in {"quick", "deaf", "dies"}
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    checks.set("gradwire.v1.TrainerService", status)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    add_TrainerServiceServicer_to_server(Servicer(args.base_model), server)
    if args.tls_cert_file is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (args.tls_key_file.read_bytes(), args.tls_cert_file.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    write_ready_file(args.ready_file, address=f"127.0.0.1:{port}", metrics_address="")

    def end_with_stdin() -> None:
        while sys.stdin.read(1):
            pass
        os._exit(0)

    threading.Thread(target=end_with_stdin, daemon=True).start()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
