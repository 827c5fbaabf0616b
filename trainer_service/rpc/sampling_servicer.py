"""SamplingService: translates and delegates."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceServicer

from trainer_service.rpc.trainer_servicer import refuse_while_draining
from trainer_service.runs.sampling import SampleRequests


class SamplingServicer(SamplingServiceServicer):
    """Serves the samplers of one trainer.

    Args:
        sampling: Carries out requests.
        base_model: Name of the model it serves, as callers see it.
        draining: Set when the trainer shuts down.
    """

    def __init__(self, sampling: SampleRequests, *, base_model: str, draining: asyncio.Event) -> None:
        self._sampling = sampling
        self._base_model = base_model
        self._draining = draining

    async def Sample(self, request: pb.SampleRequest, context: Any) -> AsyncGenerator[pb.SampleResponse]:
        refuse_while_draining(self._draining)
        # Closed as soon as the client goes away, not when garbage is collected: that frees the request's place.
        async with contextlib.aclosing(self._sampling.sample(request)) as responses:
            async for response in responses:
                yield response

    async def ComputeLogprobs(self, request: pb.ComputeLogprobsRequest, context: Any) -> pb.ComputeLogprobsResponse:
        refuse_while_draining(self._draining)
        sample = pb.SampleRequest(
            sampler=request.sampler,
            prompt=request.prompt,
            prompt_text=request.prompt_text,
            sampling_params=pb.SamplingParams(max_tokens=0),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=request.topk_prompt_logprobs,
        )
        if request.HasField("prompt_logprobs_last_n"):
            sample.prompt_logprobs_last_n = request.prompt_logprobs_last_n
        found = pb.ComputeLogprobsResponse()
        async with contextlib.aclosing(self._sampling.sample(sample)) as responses:
            async for response in responses:
                found.prompt.MergeFrom(response.prompt)
        return found

    async def OpenSampler(self, request: pb.OpenSamplerRequest, context: Any) -> pb.OpenSamplerResponse:
        refuse_while_draining(self._draining)
        await self._sampling.open(request.sampler, lease_ms=request.lease_ms)
        return pb.OpenSamplerResponse(base_model=self._base_model)

    async def CloseSampler(self, request: pb.CloseSamplerRequest, context: Any) -> pb.CloseSamplerResponse:
        await self._sampling.close(request.sampler)
        return pb.CloseSamplerResponse()
