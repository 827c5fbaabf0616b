"""Gradwire: train language models on a self-hosted trainer from an ordinary Python loop.

service = gradwire.ServiceClient("http://127.0.0.1:7777")
client = service.create_training_client()
client.forward_backward(data, "cross_entropy")
client.optim_step(gradwire.AdamParams(learning_rate=1e-5)).result()
"""

import sys
from typing import TYPE_CHECKING

from gradwire import forks as forks  # Before anything that imports grpc.
from gradwire import ported_names, types
from gradwire.chats import datum_from_messages
from gradwire.checkpoint_client import Checkpoint, CheckpointClient, CheckpointFile
from gradwire.data import datum_from_tokens_weights
from gradwire.errors import GradwireError
from gradwire.futures import APIFuture
from gradwire.jobs import TrainerJob, TrainerJobConfig, TrainerJobManager
from gradwire.ported_names import (
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
from gradwire.rest_client import RestClient, TrainingRun
from gradwire.run_metrics import RunMetrics
from gradwire.sampling_client import SamplingClient
from gradwire.service_client import FiretitanServiceClient, ServiceClient
from gradwire.training_client import TrainingClient
from gradwire.transport import ClientTls
from gradwire.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ForwardOutput,
    LoraConfig,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepResponse,
    SampledSequence,
    SampledToken,
    SampleResponse,
    SamplingParams,
    SavedState,
    SaveWeightsResult,
    StopReason,
    TensorData,
    TensorDtype,
)
from gradwire.version import __version__

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIStatusError",
    "APITimeoutError",
    "AdamParams",
    "AuthenticationError",
    "BadRequestError",
    "Checkpoint",
    "CheckpointClient",
    "CheckpointFile",
    "ClientTls",
    "ConflictError",
    "Datum",
    "EncodedTextChunk",
    "FiretitanServiceClient",
    "ForwardBackwardOutput",
    "ForwardOutput",
    "GradwireError",
    "InternalServerError",
    "LoraConfig",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepResponse",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestFailedError",
    "RestClient",
    "RunMetrics",
    "SampleResponse",
    "SampledSequence",
    "SampledToken",
    "SamplingClient",
    "SamplingParams",
    "SaveWeightsResult",
    "SavedState",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TrainerJob",
    "TrainerJobConfig",
    "TrainerJobManager",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "__version__",
    "datum_from_messages",
    "datum_from_tokens_weights",
    "types",
]

if not TYPE_CHECKING:  # Else editors would take any name for one of the package's.

    def __getattr__(name: str) -> object:
        raise ported_names.missing("gradwire", name, sys.modules[__name__])
