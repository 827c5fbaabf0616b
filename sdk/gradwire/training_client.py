"""The client of one run: every call returns a future at once, is sent in call order, and executes in that order."""

import uuid
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import Any, Literal

from gradwire._client import answers
from gradwire._client.async_twins import off_thread, submitted
from gradwire._client.custom_loss import CustomLossFn, LossThread
from gradwire._client.loop import LOOP
from gradwire._client.ported_names import RefusesTinkerNames, refuse_given, refuse_other_optimizer
from gradwire._client.requests import adam_params_of, batch_content
from gradwire._client.run_calls import RunCalls
from gradwire._client.saving import SavingCalls
from gradwire._client.stream import RunStream
from gradwire._client.tokenizer_client import load_tokenizer
from gradwire._client.transport import Connection
from gradwire.errors import invalid_field
from gradwire.futures import APIFuture
from gradwire.sampling_client import SamplingClient, open_sampling_client
from gradwire.types import (
    ForwardBackwardOutput,
    OptimStepResponse,
)
from gradwire.types.run_info import RunInfo
from gradwire.types.server_info import ServerInfo
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.run_pb2 import Run
from gradwire.v1.trainer_service_pb2 import (
    DeleteRunRequest,
    ForkRunRequest,
    GetRunRequest,
    TrainRequest,
)
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

GradAccumulationNormalization = Literal["none", "num_loss_tokens", "num_sequences"]
_NORMALIZATIONS = {
    "none": ops.GRAD_ACCUMULATION_NORMALIZATION_NONE,
    "num_loss_tokens": ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS,
    "num_sequences": ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES,
}


class TrainingClient(SavingCalls, RefusesTinkerNames):
    """Drives one run. Made by ServiceClient; usable from any thread.

    Calls return an APIFuture at once and may be made far ahead: they are sent, and execute, in the order made. Losses
    are sums over tokens and datums; gradients add up until optim_step uses and clears them.

    Every call has an `…_async` twin for coroutines. Where the call returns a future, awaiting the twin makes the call
    and gives that future, to be awaited as well; elsewhere it gives the answer, and the event loop goes on meanwhile.
    """

    def __init__(
        self,
        connection: Connection,
        run: Run,
        server_info: ServerInfo,
        *,
        reconnect_timeout_s: float = 120.0,
        made: "Callable[[TrainingClient], object]" = lambda client: None,
    ) -> None:
        self._made = made
        self._reconnect_timeout_s = reconnect_timeout_s
        self.run_id = run.run_id
        self.base_model = run.base_model
        self._connection = connection
        self._server_info = server_info
        self._stream = RunStream(connection, run.run_id, server_info.limits, reconnect_timeout_s)
        self._losses = LossThread(f"gradwire-loss-{run.run_id}")
        self._calls = RunCalls(self._stream, self._losses, server_info.limits)
        # A client that is forgotten is not closed: what it called completes.
        self._finalizer = weakref.finalize(self, _forgotten, self._stream, self._losses)
        # At exit the loop itself is stopped, streams and all.
        self._finalizer.atexit = False

    # ── training ──────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(
        self, data: Iterable[Any], loss_fn: str = "", loss_fn_config: Mapping[str, float] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Per-token logprobs of the targets, without gradients.

        Args:
            data: Datums, ours or tinker's; each with loss_fn_inputs["target_tokens"].
            loss_fn: Name of a built-in loss to evaluate as well; "" evaluates none.
            loss_fn_config: The loss's settings.

        Returns:
            Future of the output: `loss_fn_outputs[i]["logprobs"]` of `data[i]`, float32, natural log, shaped as its
            targets, [N], or [N, K] of soft ones; metrics "loss:sum" (nats) and others where a loss was evaluated.

        Raises:
            InvalidArgumentError: The data cannot be sent as it is; names the datum and input. Errors found by the
                trainer come through the future.
            ResourceExhaustedError: LIMIT_EXCEEDED: one datum is larger than a message may be.
        """
        settings = ops.ForwardRequest(loss_fn=loss_fn, loss_fn_config=loss_fn_config or {})
        requests = self._calls.pieces(data, partial(batch_content, "forward", settings))
        return self._calls.send("forward", requests, answers.forward_output, overtakes_losses=True)

    def forward_backward(
        self, data: Iterable[Any], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, float] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """A built-in loss: its gradients are added to the run's.

        Args:
            data: Datums, ours or tinker's, with the inputs the loss reads ("target_tokens" and "weights" for
                cross_entropy).
            loss_fn: Name of the loss; ServiceClient.get_server_info() lists them.
            loss_fn_config: The loss's settings.

        Returns:
            Future of the output, as forward's: per-token logprobs, and metrics with "loss:sum", the sum over the tokens
            and datums of this call in nats.

        Raises:
            InvalidArgumentError: As forward.
        """
        settings = ops.ForwardBackwardRequest(loss_fn=loss_fn, loss_fn_config=loss_fn_config or {})
        requests = self._calls.pieces(data, partial(batch_content, "forward_backward", settings))
        return self._calls.send("forward_backward", requests, answers.forward_output)

    def forward_backward_custom(
        self, data: Iterable[Any], loss_fn: CustomLossFn, *, loss_type_input: Literal["logprobs"] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Any loss you can write in torch, for the price of one forward.

        The trainer computes the logprobs and keeps the graph; `loss_fn(data, logprobs_list)` runs here, on a thread of
        its own, with one float32 leaf a datum (requires_grad, shaped as the targets) and returns (scalar loss,
        metrics); its gradients go back through the kept graph. A datum the loss ignores gets zero gradient. Inside
        `loss_fn`, `forward` of this client may be called and waited for; other calls are refused.

        If `loss_fn` raises, the future raises the same and nothing is accumulated; an optim_step that was already
        called behind it is refused (PriorOperationFailedError) rather than applied without this loss.

        Args:
            data: As in forward_backward; `loss_fn` gets it as a list.
            loss_fn: The loss.
            loss_type_input: What `loss_fn` is given: "logprobs", which None means too.

        Returns:
            Future of the output, whose metrics are those `loss_fn` returned and "loss:sum", the loss.

        Raises:
            InvalidArgumentError: As forward; also an unknown loss_type_input.
        """
        if loss_type_input not in (None, "logprobs"):
            raise invalid_field("loss_type_input", f'is {loss_type_input!r}; it must be "logprobs".')
        if not callable(loss_fn):
            raise invalid_field(
                "loss_fn", f"is a {type(loss_fn).__name__}; it must be a function of (data, logprobs_list)."
            )
        data = list(data) if isinstance(data, Iterable) else data
        return self._calls.send_custom("forward_backward_custom", data, loss_fn)

    def optim_step(
        self,
        optim_params: Any = None,
        *,
        adam_params: Any = None,
        grad_accumulation_normalization: GradAccumulationNormalization = "none",
    ) -> APIFuture[OptimStepResponse]:
        """AdamW on the accumulated gradients, which it clears.

        Args:
            optim_params: AdamParams, ours or tinker's; None takes the defaults.
            adam_params: The older name of optim_params; give one of them.
            grad_accumulation_normalization: What gradients are divided by before clipping.

        Returns:
            Future of the number of steps applied, and metrics; "grad_norm:mean" is the global L2 norm before clipping.

        Raises:
            InvalidArgumentError: The normalization is unknown, both names are given, or the hyperparameters are another
                optimizer's or out of range.
        """
        if adam_params is not None:
            refuse_given("it is optim_params under its older name; give one of them.", optim_params=optim_params)
            optim_params = adam_params
        refuse_other_optimizer("optim_params", optim_params)
        if grad_accumulation_normalization not in _NORMALIZATIONS:
            raise invalid_field(
                "grad_accumulation_normalization",
                f"is {grad_accumulation_normalization!r}; it must be one of {', '.join(map(repr, _NORMALIZATIONS))}.",
            )
        params = adam_params_of(optim_params)
        normalization = _NORMALIZATIONS[grad_accumulation_normalization]
        request = ops.OptimStepRequest(**vars(params), grad_accumulation_normalization=normalization)
        return self._calls.send("optim_step", [TrainRequest(optim_step=request)], answers.optim_step, barrier=True)

    def zero_grad(self) -> APIFuture[None]:
        """Clears accumulated gradients, and the mark a failed call left on them."""
        request = TrainRequest(zero_grad=ops.ZeroGradRequest())
        return self._calls.send("zero_grad", [request], answers.nothing, barrier=True)

    # ── about the run ─────────────────────────────────────────────────────────────────────────────────────────────

    def get_info(self, *, timeout_s: float = 30.0) -> RunInfo:
        """What the run is and where it stands; asks the trainer."""
        answer = self._connection.call(
            TrainerServiceStub, "GetRun", GetRunRequest(run_id=self.run_id), timeout_s=timeout_s
        )
        return answers.run_info(answer.run, self._server_info.models[0])

    def fork(self, step: int | None = None, *, display_name: str = "", timeout_s: float = 600.0) -> "TrainingClient":
        """A client of a new run with the state this one had after a step; see ServiceClient.fork_run.

        Args:
            step: Number of optimizer steps applied in the state to copy; None takes as many as are applied now, without
                calls that are not answered yet.
            display_name: Your name for the new run.
            timeout_s: Longest wait, seconds.
        """
        request = ForkRunRequest(run_id=self.run_id, step=step, request_id=uuid.uuid4().hex, display_name=display_name)
        answer = self._connection.call(TrainerServiceStub, "ForkRun", request, timeout_s=timeout_s)
        client = TrainingClient(
            self._connection,
            answer.run,
            self._server_info,
            reconnect_timeout_s=self._reconnect_timeout_s,
            made=self._made,
        )
        self._made(client)
        return client

    def create_sampling_client(
        self,
        model_path: str,
        retry_config: Any = None,
        record_stability_info: bool = False,
        *,
        timeout_s: float = 600.0,
    ) -> SamplingClient:
        """A client of saved sampler weights; see ServiceClient.create_sampling_client."""
        return open_sampling_client(
            self._connection,
            model_path=model_path,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
            timeout_s=timeout_s,
        )

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, fetched from the trainer and loaded with transformers."""
        return load_tokenizer(self._connection)

    def delete_run(self, *, timeout_s: float = 60.0) -> None:
        """Frees the run's memory on the trainer and closes this client. Saved checkpoints stay."""
        self.close()
        self._connection.call(
            TrainerServiceStub, "DeleteRun", DeleteRunRequest(run_id=self.run_id), timeout_s=timeout_s
        )

    def close(self) -> None:
        """Leaves the run, which stays on the trainer. Futures that are not answered yet fail; those of a client that is
        garbage-collected without `close` complete."""
        if self._finalizer.detach() is not None and not LOOP.lost:
            self._losses.stop()
            LOOP.call_soon(self._stream.close)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A TrainingClient cannot be pickled or copied: it keeps its run's calls in order, which one process must "
            "do. To go on in another process, close() it and call ServiceClient(…).training_client(run_id) there; to "
            "sample there, pickle the SamplingClient of save_weights_and_get_sampling_client()."
        )

    def result(self, timeout: float | None = None) -> "TrainingClient":
        """Returns this client, which is ready: for loops that wait for it as for a future."""
        return self

    async def result_async(self, timeout: float | None = None) -> "TrainingClient":
        """As `result`, for coroutines."""
        return self

    def __await__(self) -> Generator[Any, None, "TrainingClient"]:
        return self.result_async().__await__()

    # ── for coroutines ────────────────────────────────────────────────────────────────────────────────────────────

    forward_async = submitted(forward)
    forward_backward_async = submitted(forward_backward)
    forward_backward_custom_async = submitted(forward_backward_custom)
    optim_step_async = submitted(optim_step)
    zero_grad_async = submitted(zero_grad)
    get_info_async = off_thread(get_info)
    fork_async = off_thread(fork)
    create_sampling_client_async = off_thread(create_sampling_client)
    get_tokenizer_async = off_thread(get_tokenizer)
    delete_run_async = off_thread(delete_run)

    def __enter__(self) -> "TrainingClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _forgotten(stream: RunStream, losses: LossThread) -> None:
    if not LOOP.lost:
        LOOP.call_soon(stream.leave, losses.stop)
