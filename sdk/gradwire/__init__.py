"""Gradwire: train language models on a self-hosted trainer from an ordinary Python loop.

service = gradwire.ServiceClient("http://127.0.0.1:7777")
client = service.create_training_client()
client.forward_backward(data, "cross_entropy")
client.optim_step(gradwire.AdamParams(learning_rate=1e-5)).result()
"""

import sys
from typing import TYPE_CHECKING

# Before anything that imports grpc.
from gradwire._client import process_forks as process_forks

# isort: split
from gradwire import types
from gradwire._client import ported_names
from gradwire._client.ported_names import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestFailedError,
    TinkerError,
    UnprocessableEntityError,
)
from gradwire._client.run_metrics import RunMetrics
from gradwire._client.tls import ClientTls
from gradwire._wire.protocol_version import __version__
from gradwire.chats import datum_from_messages
from gradwire.checkpoint_client import Checkpoint, CheckpointClient, CheckpointFile
from gradwire.data import datum_from_tokens_weights
from gradwire.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    DeviceOutOfMemoryError,
    FailedPreconditionError,
    GradwireError,
    InternalError,
    InvalidArgumentError,
    NoGradientsError,
    OperationCancelledError,
    OperationPoisonedError,
    OperationTimeoutError,
    OutOfRangeError,
    PriorOperationFailedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    WorkerDiedError,
)
from gradwire.futures import APIFuture
from gradwire.jobs import TrainerJob, TrainerJobConfig, TrainerJobManager
from gradwire.rest_client import (
    CheckpointsListResponse,
    Cursor,
    ListedCheckpoint,
    RestClient,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from gradwire.sampling_client import SamplingClient
from gradwire.service_client import FiretitanServiceClient, ServiceClient
from gradwire.training_client import TrainingClient
from gradwire.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ForwardOutput,
    Limits,
    ListedRun,
    LoraConfig,
    LoraLayout,
    LossFnOutputs,
    LossInfo,
    Mesh,
    ModelData,
    ModelInfo,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepResponse,
    ReplayDifference,
    ReplayReport,
    RunInfo,
    SampledSequence,
    SampledToken,
    SampleResponse,
    SamplingParams,
    SavedState,
    SaveWeightsResult,
    ServerCapabilities,
    ServerInfo,
    StopReason,
    SupportedModel,
    TensorData,
    TensorDtype,
    Timing,
    TopkLogprobs,
)

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIStatusError",
    "APITimeoutError",
    "AbortedError",
    "AdamParams",
    "AlreadyExistsError",
    "AuthenticationError",
    "BadRequestError",
    "Checkpoint",
    "CheckpointClient",
    "CheckpointFile",
    "CheckpointsListResponse",
    "ClientTls",
    "ConflictError",
    "Cursor",
    "DataLossError",
    "Datum",
    "DeviceOutOfMemoryError",
    "EncodedTextChunk",
    "FailedPreconditionError",
    "FiretitanServiceClient",
    "ForwardBackwardOutput",
    "ForwardOutput",
    "GradwireError",
    "InternalError",
    "InternalServerError",
    "InvalidArgumentError",
    "Limits",
    "ListedCheckpoint",
    "ListedRun",
    "LoraConfig",
    "LoraLayout",
    "LossFnOutputs",
    "LossInfo",
    "Mesh",
    "ModelData",
    "ModelInfo",
    "ModelInput",
    "ModelInputChunk",
    "NoGradientsError",
    "NotFoundError",
    "OperationCancelledError",
    "OperationPoisonedError",
    "OperationTimeoutError",
    "OptimParams",
    "OptimStepResponse",
    "OutOfRangeError",
    "PermissionDeniedError",
    "PriorOperationFailedError",
    "RateLimitError",
    "ReplayDifference",
    "ReplayReport",
    "RequestFailedError",
    "ResourceExhaustedError",
    "RestClient",
    "RunInfo",
    "RunMetrics",
    "SampleResponse",
    "SampledSequence",
    "SampledToken",
    "SamplingClient",
    "SamplingParams",
    "SaveWeightsResult",
    "SavedState",
    "ServerCapabilities",
    "ServerInfo",
    "ServiceClient",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "Timing",
    "TinkerError",
    "TopkLogprobs",
    "TrainerJob",
    "TrainerJobConfig",
    "TrainerJobManager",
    "TrainingClient",
    "TrainingRun",
    "TrainingRunsResponse",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnprocessableEntityError",
    "WeightsInfoResponse",
    "WorkerDiedError",
    "__version__",
    "datum_from_messages",
    "datum_from_tokens_weights",
    "types",
]

if not TYPE_CHECKING:  # Else editors would take any name for one of the package's.

    def __getattr__(name: str) -> object:
        raise ported_names.missing("gradwire", name, sys.modules[__name__])
