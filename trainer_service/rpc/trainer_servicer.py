"""TrainerService: translates and delegates."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
from gradwire._wire.protocol_version import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION, __version__
from gradwire.errors import error, from_status, invalid_field
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.run_metrics_pb2 import GetMetricsRequest, GetMetricsResponse, MetricSeries
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceServicer

from trainer_service.config import Limits
from trainer_service.field_limits import check_limits, check_name, find_excess
from trainer_service.fleet.worker import Worker
from trainer_service.rpc.checkpoint_gate import CheckpointGate
from trainer_service.rpc.tokenizer_download import TokenizerDownload
from trainer_service.rpc.train_stream import TrainStream, read_attach
from trainer_service.runs.operation import Operation
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Run
from trainer_service.runs.run_metrics import RunMetrics
from trainer_service.served_model import ServedModel
from trainer_service.tracing import trace_headers

MAX_ANSWER_WAIT_MS = 60_000
"""The longest that GetAnswer waits; a proxy in between would cut a longer call."""


class TrainerServicer(TrainerServiceServicer):
    """Serves one trainer.

    Args:
        runs: Its runs.
        worker: Its worker.
        limits: The most a client may send.
        draining: Set when the trainer shuts down.
        gate: The gate for saves and loads.
        base_model: The model it serves.
        metrics: The runs' curves.
    """

    def __init__(
        self,
        runs: Runs,
        worker: Worker,
        *,
        limits: Limits,
        draining: asyncio.Event,
        gate: CheckpointGate,
        base_model: ServedModel,
        metrics: RunMetrics,
    ) -> None:
        self._base_model = base_model
        self._metrics = metrics
        self._gate = gate
        self._runs = runs
        self._worker = worker
        self._limits = limits
        self._draining = draining
        self._tokenizer = TokenizerDownload()

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        ready = self._worker.ready
        draining = self._draining.is_set()
        limits = {field.name: getattr(self._limits, field.name) for field in pb.Limits.DESCRIPTOR.fields}
        return pb.GetServerInfoResponse(
            software_version=__version__,
            min_protocol_version=MIN_PROTOCOL_VERSION,
            max_protocol_version=PROTOCOL_VERSION,
            models=[self._described(ready.model)] if ready else [],
            losses=ready.losses if ready else [],
            limits=pb.Limits(**limits),
            ready=ready is not None and self._worker.responding and not draining,
            status_message="shutting down" if draining else self._status_message(),
        )

    def _described(self, model: pb.ModelInfo) -> pb.ModelInfo:
        described = pb.ModelInfo()
        described.CopyFrom(model)
        described.base_model = self._base_model.name
        described.aliases[:] = self._base_model.aliases
        return described

    def _status_message(self) -> str:
        return self._base_model.without_source(self._worker.status_message)

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:
        refuse_while_draining(self._draining)
        return pb.CreateRunResponse(run=(await self._runs.create(request)).describe(layout=True))

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=self._runs.get(request.run_id).describe(layout=True))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        return pb.ListRunsResponse(runs=[run.describe() for run in self._runs.list()])

    async def GetMetrics(self, request: GetMetricsRequest, context: Any) -> GetMetricsResponse:
        found = await self._metrics.points(
            self._runs.get(request.run_id),
            names=request.names,
            since_step=request.since_step,
            after_seq_id=request.after_seq_id,
        )
        return GetMetricsResponse(
            seq_ids=found.seq_ids,
            steps=found.steps,
            times_s=found.times_s,
            series=[MetricSeries(name=name, values=values) for name, values in found.series.items()],
            more=found.more,
            names_left_out=found.names_left_out,
        )

    async def ForkRun(self, request: pb.ForkRunRequest, context: Any) -> pb.ForkRunResponse:
        refuse_while_draining(self._draining)
        return pb.ForkRunResponse(run=(await self._runs.fork(request)).describe())

    async def ReplayRun(self, request: pb.ReplayRunRequest, context: Any) -> pb.ReplayRunResponse:
        refuse_while_draining(self._draining)
        found = await self._runs.replay(request.run_id)
        response = pb.ReplayRunResponse(
            after_seq_id=found.after_seq_id, compared=found.compared, not_compared=found.not_compared
        )
        if (difference := found.difference) is not None:
            response.difference.CopyFrom(
                pb.ReplayDifference(
                    seq_id=difference.seq_id,
                    kind=difference.kind,
                    step=difference.step,
                    recorded_digest=difference.recorded,
                    replayed_digest=difference.replayed,
                )
            )
        return response

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:
        await self._runs.delete(request.run_id)
        return pb.DeleteRunResponse()

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, context: Any) -> pb.GetTokenizerResponse:
        return pb.GetTokenizerResponse(files=await self._tokenizer.files(self._model_folder()))

    async def DownloadTokenizer(
        self, request: pb.DownloadTokenizerRequest, context: Any
    ) -> AsyncIterator[pb.DownloadTokenizerResponse]:
        async with contextlib.aclosing(self._tokenizer.read(self._model_folder(), request.file)) as pieces:
            async for data in pieces:
                yield pb.DownloadTokenizerResponse(data=data)

    def _model_folder(self) -> Path:
        ready = self._worker.ready
        if ready is None:
            text = f"The model is not loaded yet: {self._status_message()}."
            raise error("WORKER_NOT_READY", text, retry_after_s=0.5)
        assert ready.model_folder, "a worker that does not say where its model is"
        return Path(ready.model_folder)

    async def Train(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        first = await read_attach(context)
        check_limits(first.attach, self._limits)
        refuse_while_draining(self._draining)
        run = self._runs.get(first.attach.run_id)
        run.acknowledge(first.acked_seq_id)
        stream = TrainStream(
            run,
            context,
            limits=self._limits,
            draining=self._draining,
            gate=self._gate,
        )
        await stream.serve(first.attach.client_id)

    async def GetAnswer(self, request: pb.GetAnswerRequest, context: Any) -> pb.GetAnswerResponse:
        run = self._runs.get(request.run_id)
        if not request.seq_id:
            raise invalid_field("seq_id", "is absent; give the number of an operation, from 1.")
        if request.timeout_ms > MAX_ANSWER_WAIT_MS:
            what = f"is {request.timeout_ms}; it must be 0 to {MAX_ANSWER_WAIT_MS}. Ask again while it is pending."
            raise invalid_field("timeout_ms", what, limit=MAX_ANSWER_WAIT_MS, got=request.timeout_ms)
        stop_s = time.monotonic() + request.timeout_ms / 1000
        answer = await run.answer_of(request.seq_id, timeout_s=request.timeout_ms / 1000)
        if answer is not None:
            answer = await self._gate.after_within(run, answer, max(0.0, stop_s - time.monotonic()))
        if answer is None:
            return pb.GetAnswerResponse(pending=True)
        return pb.GetAnswerResponse(response=pb.TrainResponse.FromString(answer))

    async def Forward(self, request: ops.ForwardRequest, context: Any) -> ops.ForwardResponse:
        return await self._operation("forward", request, context)

    async def ForwardBackward(self, request: ops.ForwardBackwardRequest, context: Any) -> ops.ForwardBackwardResponse:
        return await self._operation("forward_backward", request, context)

    async def Backward(self, request: ops.BackwardRequest, context: Any) -> ops.BackwardResponse:
        return await self._operation("backward", request, context)

    async def OptimStep(self, request: ops.OptimStepRequest, context: Any) -> ops.OptimStepResponse:
        return await self._operation("optim_step", request, context)

    async def ZeroGrad(self, request: ops.ZeroGradRequest, context: Any) -> ops.ZeroGradResponse:
        return await self._operation("zero_grad", request, context)

    async def Cancel(self, request: ops.CancelRequest, context: Any) -> ops.CancelResponse:
        return await self._operation("cancel", request, context)

    async def SaveWeightsForSampler(
        self, request: ops.SaveWeightsForSamplerRequest, context: Any
    ) -> ops.SaveWeightsForSamplerResponse:
        return await self._operation("save_weights_for_sampler", request, context)

    async def SaveState(self, request: ops.SaveStateRequest, context: Any) -> ops.SaveStateResponse:
        return await self._operation("save_state", request, context)

    async def LoadState(self, request: ops.LoadStateRequest, context: Any) -> ops.LoadStateResponse:
        return await self._operation("load_state", request, context)

    async def _operation(self, kind: str, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """One ordered operation as a unary call."""
        check_name(request.run_id, "run_id", self._limits)
        run = self._runs.get(request.run_id)
        if request.HasField("seq_id") and not request.seq_id:
            raise invalid_field("seq_id", "is 0; operations count from 1. Leave it out to take the run's next number.")
        self._refuse_to_cut_in(run)
        await run.room(self._limits.max_in_flight_operations)
        refusal = find_excess(request, self._limits)
        if refusal is None:
            await self._gate.before(run, Operation.made(pb.TrainRequest(**{kind: request})))
        # A client may have attached, or a drain begun, while it waited.
        self._refuse_to_cut_in(run)
        seq_id = request.seq_id if request.HasField("seq_id") else run.next_seq_id
        # The call itself says both; without them a repeat is the same operation however it is sent.
        request.ClearField("run_id")
        request.ClearField("seq_id")
        if refusal is None:
            fields: dict[str, Any] = {kind: request, **trace_headers.get()}
            operation = Operation.made(pb.TrainRequest(seq_id=seq_id, **fields))
        else:
            operation = Operation.refused(kind, request, refusal, seq_id=seq_id)
        response = await run.execute(operation)
        if self._gate.stores(operation):
            response.MergeFromString(await self._gate.after(response.SerializeToString()))
        context.set_trailing_metadata(
            tuple((f"gradwire-{part}-ms", f"{getattr(response, f'{part}_ms'):.3f}") for part in _TIMES)
        )
        if response.WhichOneof("result") == "error":
            raise from_status(response.error)
        return getattr(response, kind)

    def _refuse_to_cut_in(self, run: Run) -> None:
        refuse_while_draining(self._draining)
        if run.attachment is not None:
            text = (
                f"A client is attached to {run.run_id}, and an operation from elsewhere would break its order. Wait "
                "until it leaves, or create a run of your own."
            )
            raise error("RUN_ATTACHED", text, run_id=run.run_id)


_TIMES = ("queue", "execute", "transfer")


def refuse_while_draining(draining: asyncio.Event) -> None:
    """Refuses new work once the trainer shuts down.

    Raises:
        UnavailableError: DRAINING.
    """
    if draining.is_set():
        raise error("DRAINING", "The trainer is shutting down and takes no new work.", retry_after_s=5.0)
