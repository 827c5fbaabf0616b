"""Gradwire: train language models on a self-hosted trainer from an ordinary Python loop.

service = gradwire.ServiceClient("http://127.0.0.1:7777")
client = service.create_training_client()
client.forward_backward(data, "cross_entropy")
client.optim_step(gradwire.AdamParams(learning_rate=1e-5)).result()
"""

from gradwire import forks as forks
from gradwire.chats import datum_from_messages
from gradwire.checkpoint_client import Checkpoint, CheckpointClient, CheckpointFile
from gradwire.data import datum_from_tokens_weights
from gradwire.errors import GradwireError
from gradwire.futures import APIFuture
from gradwire.jobs import TrainerJob, TrainerJobConfig, TrainerJobManager
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
    OptimStepResponse,
    SampledSequence,
    SampledToken,
    SampleResponse,
    SamplingParams,
    SaveWeightsResult,
    TensorData,
)
from gradwire.version import __version__

__all__ = [
    "APIFuture",
    "AdamParams",
    "Checkpoint",
    "CheckpointClient",
    "CheckpointFile",
    "ClientTls",
    "Datum",
    "EncodedTextChunk",
    "FiretitanServiceClient",
    "ForwardBackwardOutput",
    "ForwardOutput",
    "GradwireError",
    "LoraConfig",
    "ModelInput",
    "OptimStepResponse",
    "SampleResponse",
    "SampledSequence",
    "SampledToken",
    "SamplingClient",
    "SamplingParams",
    "SaveWeightsResult",
    "ServiceClient",
    "TensorData",
    "TrainerJob",
    "TrainerJobConfig",
    "TrainerJobManager",
    "TrainingClient",
    "__version__",
    "datum_from_messages",
    "datum_from_tokens_weights",
]
