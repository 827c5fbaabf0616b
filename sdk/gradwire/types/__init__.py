"""The values users pass in and get back. numpy only; torch is imported only where a method returns torch tensors.

Names and shapes are those users of tinker know. Inputs are duck-typed: wherever Gradwire takes one of these it takes
any object with the same attributes.
"""

from gradwire.types.data import Datum, EncodedTextChunk, ModelInput, TensorData, TensorDtype
from gradwire.types.outputs import ForwardBackwardOutput, LossFnOutputs, LossFnType, OptimStepResponse, Timing
from gradwire.types.params import AdamParams, LoraConfig, SamplingParams
from gradwire.types.replay import ReplayDifference, ReplayReport
from gradwire.types.run_info import ListedRun, LoraLayout, ModelData, RunInfo, ServerCapabilities, SupportedModel
from gradwire.types.sampling_results import SampledSequence, SampledToken, SampleResponse, StopReason, TopkLogprobs
from gradwire.types.saved import SavedState, SaveWeightsResult
from gradwire.types.server_info import Limits, LossInfo, Mesh, ModelInfo, ServerInfo

__all__ = [
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "ForwardOutput",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "Limits",
    "ListedRun",
    "LoraConfig",
    "LoraLayout",
    "LossFnOutputs",
    "LossFnType",
    "LossInfo",
    "Mesh",
    "ModelData",
    "ModelInfo",
    "ModelInput",
    "ModelInputChunk",
    "OptimParams",
    "OptimStepResponse",
    "ReplayDifference",
    "ReplayReport",
    "RunInfo",
    "SampleResponse",
    "SampledSequence",
    "SampledToken",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "SaveWeightsResult",
    "SavedState",
    "ServerCapabilities",
    "ServerInfo",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "Timing",
    "TopkLogprobs",
]

# The names that users of tinker know them by.
ForwardOutput = ForwardBackwardOutput
GetInfoResponse = RunInfo
GetServerCapabilitiesResponse = ServerCapabilities
ModelInputChunk = EncodedTextChunk
OptimParams = AdamParams
SaveWeightsForSamplerResponse = SaveWeightsResult
SaveWeightsResponse = SavedState
