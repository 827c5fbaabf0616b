"""The client of one run: every call returns a future at once, is sent in call order, and executes in that order."""

import logging
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, Literal, TypeVar

import numpy as np
from google.protobuf.message import Message

from gradwire import answers
from gradwire.async_twins import awaited, off_thread, submitted
from gradwire.checkpoint_client import check_ttl_seconds
from gradwire.codec import Batch, batch_from_data, batch_parts, split, tensor_parts
from gradwire.custom_loss import CustomLossFn, LossThread, reported_metrics, run_custom_loss
from gradwire.errors import from_status, invalid_field
from gradwire.futures import APIFuture
from gradwire.order import Call, Operation
from gradwire.ported_names import NO_ACCESS_TOKENS, RefusesTinkerNames, refuse_given, refuse_other_optimizer
from gradwire.run_info import RunInfo
from gradwire.sampling_client import NO_STABILITY_INFO, RETRIES_ITSELF, SamplingClient, open_sampling_client
from gradwire.stream import RunStream
from gradwire.tokenizer_client import load_tokenizer
from gradwire.transport import LOOP, Connection
from gradwire.types import (
    AdamParams,
    ForwardBackwardOutput,
    OptimStepResponse,
    SavedState,
    SaveWeightsResult,
)
from gradwire.user_metadata import check_user_metadata
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_TYPE_BASE, CHECKPOINT_TYPE_DELTA
from gradwire.v1.run_pb2 import Run
from gradwire.v1.trainer_service_pb2 import (
    DeleteRunRequest,
    ForkRunRequest,
    GetRunRequest,
    GetServerInfoResponse,
    TrainRequest,
    TrainResponse,
)
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub
from gradwire.wire_format import Parts, embed

logger = logging.getLogger("gradwire")

T = TypeVar("T")

GradAccumulationNormalization = Literal["none", "num_loss_tokens", "num_sequences"]
_CHECKPOINT_TYPES = {"base": CHECKPOINT_TYPE_BASE, "delta": CHECKPOINT_TYPE_DELTA}
_NORMALIZATIONS = {
    "none": ops.GRAD_ACCUMULATION_NORMALIZATION_NONE,
    "num_loss_tokens": ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS,
    "num_sequences": ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES,
}


class TrainingClient(RefusesTinkerNames):
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
        server_info: GetServerInfoResponse,
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
        self._limits = server_info.limits
        self._stream = RunStream(connection, run.run_id, server_info.limits, reconnect_timeout_s)
        self._losses = LossThread(f"gradwire-loss-{run.run_id}")
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
            Future of the output: loss_fn_outputs[i]["logprobs"] of data[i], float32, natural log, shaped as its
            targets, [N], or [N, K] of soft ones; metrics "loss:sum" (nats) and others where a loss was evaluated.

        Raises:
            InvalidArgumentError: The data cannot be sent as it is; names the datum and input. Errors found by the
                trainer come through the future.
        """
        settings = ops.ForwardRequest(loss_fn=loss_fn, loss_fn_config=loss_fn_config or {})
        requests = [_with_batch("forward", settings, piece) for piece in self._pieces(data)]
        if self._losses.current():
            # Inside a custom loss: waiting behind an optim_step that waits for this very loss would never end.
            return self._send("forward", requests, answers.forward_output, overtake=True)
        return self._send("forward", requests, answers.forward_output)

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
        self._refuse_inside_loss("forward_backward")
        settings = ops.ForwardBackwardRequest(loss_fn=loss_fn, loss_fn_config=loss_fn_config or {})
        requests = [_with_batch("forward_backward", settings, piece) for piece in self._pieces(data)]
        return self._send("forward_backward", requests, answers.forward_output)

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
            InvalidArgumentError: As forward, or another loss_type_input.
        """
        if loss_type_input not in (None, "logprobs"):
            raise invalid_field("loss_type_input", f'is {loss_type_input!r}; it must be "logprobs".')
        self._refuse_inside_loss("forward_backward_custom")
        data = list(data)
        return _CustomCall(self._stream, self._losses, data, loss_fn, self._pieces(data)).start()

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
            adam_params: The same under its older name; one of the two.
            grad_accumulation_normalization: What gradients are divided by before clipping.

        Returns:
            Future of the step's number and metrics; "grad_norm:mean" is the global L2 norm before clipping.

        Raises:
            InvalidArgumentError: No such normalization, both names, or hyperparameters of another optimizer.
        """
        self._refuse_inside_loss("optim_step")
        if adam_params is not None:
            refuse_given("it is optim_params under its older name; give one of them.", optim_params=optim_params)
            optim_params = adam_params
        refuse_other_optimizer("optim_params", optim_params)
        if grad_accumulation_normalization not in _NORMALIZATIONS:
            raise invalid_field(
                "grad_accumulation_normalization",
                f"is {grad_accumulation_normalization!r}; it must be one of {', '.join(map(repr, _NORMALIZATIONS))}.",
            )
        params = AdamParams() if optim_params is None else optim_params
        settings: dict[str, Any] = {}
        for name in AdamParams.__dataclass_fields__:
            value = getattr(params, name, None)
            if value is not None:
                settings[name] = float(value)
        request = ops.OptimStepRequest(
            **settings, grad_accumulation_normalization=_NORMALIZATIONS[grad_accumulation_normalization]
        )
        return self._send("optim_step", [TrainRequest(optim_step=request)], answers.optim_step, barrier=True)

    def zero_grad(self) -> APIFuture[None]:
        """Clears accumulated gradients, and the mark a failed call left on them."""
        self._refuse_inside_loss("zero_grad")
        return self._send("zero_grad", [TrainRequest(zero_grad=ops.ZeroGradRequest())], answers.nothing, barrier=True)

    # ── saving and loading ────────────────────────────────────────────────────────────────────────────────────────

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
        merged: bool = False,
        dtype: Any = None,
    ) -> APIFuture[SaveWeightsResult]:
        """Exports the parameters on the trainer's host: as a Hugging Face folder, those of a LoRA run as a peft folder.

        Args:
            name: Letters, digits, '.', '_' and '-'.
            ttl_seconds: When it may be deleted, seconds from now; None keeps it.
            user_metadata: Your own words about it, texts by name, listed with it; see get_server_info().limits.
            merged: Of a LoRA run: a Hugging Face folder with the adapter added into the base model's weights.
            overwrite: Replace a checkpoint of that name; otherwise a taken name is refused (AlreadyExistsError).
            dtype: What a Hugging Face folder's parameters are written in, as a name or torch's own: "float32", as they
                train, without loss, or that of the base model's files, such as "bfloat16". None: the latter; of a
                delta, its base's. An adapter is written in float32.
        """
        self._refuse_inside_loss("save_weights_for_sampler")
        request = TrainRequest(
            save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(
                name=name,
                overwrite=overwrite,
                merged=merged,
                dtype=_dtype_name(dtype),
                ttl_seconds=check_ttl_seconds(ttl_seconds),
                user_metadata=check_user_metadata(user_metadata),
            )
        )
        return self._send("save_weights_for_sampler", [request], answers.save_weights, barrier=True)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: Literal["snapshot"] = "snapshot",
    ) -> SamplingClient:
        """A sampler of the parameters as they are at this place in the run's order; they are frozen in the trainer's
        memory, and copied only once training changes them.

        Returns at once: calls of the client wait for the snapshot, and `.result()` of it does too. A run has four
        snapshots at most (get_server_info().limits.max_snapshots); beyond, the one unused longest goes. A snapshot goes
        with its run, with its worker, and with this client of it.

        Args:
            name: Without meaning; users of tinker pass one.
            retry_config: Must be None: calls are tried again until they time out.
            record_stability_info: Must be False: there is no loss that reads it.
            kind: "snapshot": make a new client after training to sample from newer parameters.

        Raises:
            InvalidArgumentError: An argument of tinker's that means nothing here.
        """
        self._refuse_inside_loss("save_weights_and_get_sampling_client")
        refuse_given(RETRIES_ITSELF, retry_config=retry_config)
        refuse_given(NO_STABILITY_INFO, record_stability_info=record_stability_info)
        if kind != "snapshot":
            raise invalid_field("kind", f'is {kind!r}; it must be "snapshot": make a new client after each step.')
        request = TrainRequest(save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(ephemeral=True))
        source = self._send("save_weights_for_sampler", [request], answers.sampler_source, barrier=True)
        return SamplingClient(self._connection, source.future())

    def save_weights_for_sampler_ext(
        self,
        name: str,
        checkpoint_type: str = "base",
        *,
        overwrite: bool = False,
        merged: bool = False,
        dtype: Any = None,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> SaveWeightsResult:
        """As save_weights_for_sampler, but waits.

        Args:
            name: As there.
            checkpoint_type: "base", all parameters; "delta", only what changed since this run's newest base, without
                loss, smaller, and loadable as long as that base is there.
            overwrite: As there.
            merged: As there.
            dtype: As there.
            ttl_seconds: As there.
            user_metadata: As there.
            timeout_s: Longest wait, seconds; None waits until it is done or given up.

        Raises:
            FailedPreconditionError: DELTA_BASE_UNUSABLE: no base was saved, or it is not as it was saved.
        """
        if checkpoint_type not in _CHECKPOINT_TYPES:
            raise invalid_field("checkpoint_type", f'is {checkpoint_type!r}; it must be "base" or "delta".')
        self._refuse_inside_loss("save_weights_for_sampler_ext")
        request = ops.SaveWeightsForSamplerRequest(
            name=name,
            overwrite=overwrite,
            merged=merged,
            checkpoint_type=_CHECKPOINT_TYPES[checkpoint_type],
            dtype=_dtype_name(dtype),
            ttl_seconds=check_ttl_seconds(ttl_seconds),
            user_metadata=check_user_metadata(user_metadata),
        )
        sent = [TrainRequest(save_weights_for_sampler=request)]
        return self._send("save_weights_for_sampler", sent, answers.save_weights, barrier=True).result(timeout_s)

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SavedState]:
        """Saves parameters, optimizer state and counters on the trainer, whole or not at all.

        What was accumulated since the last optim_step is not saved, so save after a step.

        Args:
            name: Letters, digits, '.', '_' and '-'.
            ttl_seconds: When it may be deleted, seconds from now; None keeps it.
            overwrite: Replace a state of that name, user_metadata and all; otherwise a taken name is refused
                (AlreadyExistsError).
            user_metadata: As in save_weights_for_sampler.

        Returns:
            Future of its path, "gradwire://<run_id>/state/<name>", a text that has it as `.path` too.
        """
        self._refuse_inside_loss("save_state")
        request = ops.SaveStateRequest(
            name=name,
            overwrite=overwrite,
            ttl_seconds=check_ttl_seconds(ttl_seconds),
            user_metadata=check_user_metadata(user_metadata),
        )
        return self._send("save_state", [TrainRequest(save_state=request)], answers.saved_state, barrier=True)

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[None]:
        """Loads the parameters of a saved state, of this run or another of yours; the optimizer starts afresh.

        Accumulated gradients are dropped. A state that does not fit (FailedPreconditionError), is not there
        (NotFoundError) or is damaged (DataLossError) changes nothing.

        Args:
            path: As save_state returned it.
            weights_access_token: Must be None: one's own checkpoints are open to one's key, and no others are.
        """
        return self._load(path, weights_access_token, with_optimizer=False)

    def load_state_with_optimizer(self, path: str, weights_access_token: str | None = None) -> APIFuture[None]:
        """As load_state, with the optimizer's state: training goes on as if it had never stopped."""
        return self._load(path, weights_access_token, with_optimizer=True)

    def _load(self, path: str, weights_access_token: str | None, *, with_optimizer: bool) -> APIFuture[None]:
        self._refuse_inside_loss("load_state")
        refuse_given(NO_ACCESS_TOKENS, weights_access_token=weights_access_token)
        request = TrainRequest(load_state=ops.LoadStateRequest(path=path, with_optimizer=with_optimizer))
        return self._send("load_state", [request], answers.nothing, barrier=True)

    # ── about the run ─────────────────────────────────────────────────────────────────────────────────────────────

    def get_info(self, *, timeout_s: float = 30.0) -> RunInfo:
        """What the run is and where it stands; asks the trainer."""
        answer = self._connection.call(
            TrainerServiceStub, "GetRun", GetRunRequest(run_id=self.run_id), timeout_s=timeout_s
        )
        model = self._server_info.models[0]
        return RunInfo(
            run_id=self.run_id,
            base_model=answer.run.base_model,
            lora_rank=answer.run.lora_rank,
            step=answer.run.step,
            state=answers.run_state_name(answer.run.state),
            vocab_size=model.vocab_size,
            max_context_length=model.max_context_length,
            num_parameters=model.num_parameters,
            architecture=model.architecture,
            display_name=answer.run.display_name,
            user_metadata=dict(answer.run.user_metadata),
        )

    def fork(self, step: int | None = None, *, display_name: str = "", timeout_s: float = 600.0) -> "TrainingClient":
        """A client of a new run with the state this one had after a step; see ServiceClient.fork_run.

        Args:
            step: Optimizer steps applied in the state wanted; None takes as many as are applied now, calls that were
                not answered yet left out.
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
        """The base model's tokenizer, which the trainer hands out; see tokenizer_client.load_tokenizer."""
        return load_tokenizer(self._connection)

    def delete_run(self, *, timeout_s: float = 60.0) -> None:
        """Frees the run's memory on the trainer and closes this client. Saved checkpoints stay."""
        self.close()
        self._connection.call(
            TrainerServiceStub, "DeleteRun", DeleteRunRequest(run_id=self.run_id), timeout_s=timeout_s
        )

    def close(self) -> None:
        """Leaves the run, which stays on the trainer. Futures not answered yet fail; those of a client that is only
        forgotten do not."""
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
        """This client: what made it has waited for it already. For loops that wait for it as for a future."""
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
    save_weights_for_sampler_async = submitted(save_weights_for_sampler)
    save_weights_and_get_sampling_client_async = awaited(save_weights_and_get_sampling_client)
    save_weights_for_sampler_ext_async = off_thread(save_weights_for_sampler_ext)
    save_state_async = submitted(save_state)
    load_state_async = submitted(load_state)
    load_state_with_optimizer_async = submitted(load_state_with_optimizer)
    get_info_async = off_thread(get_info)
    fork_async = off_thread(fork)
    create_sampling_client_async = off_thread(create_sampling_client)
    get_tokenizer_async = off_thread(get_tokenizer)
    delete_run_async = off_thread(delete_run)

    def __enter__(self) -> "TrainingClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pieces(self, data: Iterable[Any]) -> list[Batch]:
        return split(batch_from_data(data), self._limits.target_message_bytes)

    def _refuse_inside_loss(self, call: str) -> None:
        if self._losses.current():
            raise RuntimeError(
                f"{call} was called inside a custom loss, where it would wait for that loss. "
                "Only forward may be called there."
            )

    def _send(
        self,
        what: str,
        requests: Sequence[TrainRequest | Parts],
        combine: Callable[[list[TrainResponse]], T],
        *,
        barrier: bool = False,
        overtake: bool = False,
    ) -> APIFuture[T]:
        gather = _Gather(len(requests), combine)
        operations = [gather.operation(request) for request in requests]
        if overtake:
            LOOP.call_soon(self._stream.overtake, operations)
        else:
            LOOP.call_soon(self._stream.submit, Call(deque(operations), barrier=barrier))
        return APIFuture(gather.future, what)


def _dtype_name(dtype: Any) -> str:
    """ "bfloat16" for that or torch.bfloat16; "" for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _with_batch(kind: str, settings: Message, batch: Batch) -> Parts:
    return _encoded(kind, settings, batch=batch_parts(batch))


def backward_content(forward_seq_id: int, gradients_T: np.ndarray, metrics: Mapping[str, float] | None = None) -> Parts:
    """A backward as a field of TrainRequest, sharing memory with the gradients; `metrics` are for the run's curves."""
    settings = ops.BackwardRequest(forward_seq_id=forward_seq_id, metrics=metrics)
    return _encoded("backward", settings, gradients=tensor_parts(gradients_T))


def _encoded(kind: str, settings: Message, **large: Parts) -> Parts:
    """An operation as a field of TrainRequest: its settings, and the fields that are large by name."""
    content: Parts = [settings.SerializeToString()]
    for name, parts in large.items():
        content += embed(settings.DESCRIPTOR.fields_by_name[name].number, *parts)
    return embed(TrainRequest.DESCRIPTOR.fields_by_name[kind].number, *content)


class _Gather:
    """Collects the answers of one call's operations into one future. On the loop's thread after `operation`."""

    def __init__(self, count: int, combine: Callable[[list[TrainResponse]], Any]) -> None:
        self.future: ConcurrentFuture[Any] = ConcurrentFuture()
        # Running: the operations are in the run's order and cannot be called back.
        self.future.set_running_or_notify_cancel()
        self._answers: list[TrainResponse | None] = [None] * count
        self._places = iter(range(count))
        self._missing = count
        self._combine = combine

    def operation(self, request: TrainRequest | Parts) -> Operation:
        """The next operation of the call, encoded where it is large; its answer takes the same place among the
        answers."""
        place = next(self._places)

        def answered(response: TrainResponse) -> None:
            if response.WhichOneof("result") == "error":
                self.fail(from_status(response.error))
                return
            self._answers[place] = response
            self._missing -= 1
            if self._missing == 0 and not self.future.done():
                try:
                    self.future.set_result(self._combine([a for a in self._answers if a is not None]))
                except Exception as exc:  # An answer we cannot read must reach the caller, not kill the stream.
                    self.fail(exc)

        if isinstance(request, TrainRequest):
            return Operation(request, answered=answered, failed=self.fail)
        return Operation(TrainRequest(), answered=answered, failed=self.fail, content=request)

    def fail(self, exc: BaseException) -> None:
        """Fails the future, unless a piece already did."""
        if not self.future.done():
            self.future.set_exception(exc)


class _CustomCall:
    """A forward_backward_custom on its way: forwards, the user's function, backwards."""

    def __init__(
        self, stream: RunStream, losses: LossThread, data: list[Any], fn: CustomLossFn, pieces: list[Batch]
    ) -> None:
        self._stream = stream
        self._losses = losses
        self._data = data
        self._fn = fn
        self._row_counts = [piece.num_tokens for piece in pieces]
        self._result = _Gather(len(pieces), self._output)
        forwards = _Gather(len(pieces), lambda responses: responses)
        forwards.future.add_done_callback(self._forwarded)
        settings = ops.ForwardRequest(keep_graph=True)
        self._forwards = [forwards.operation(_with_batch("forward", settings, piece)) for piece in pieces]
        self._call = Call(deque(self._forwards), custom=True)
        self._forward_output = answers.forward_output([])
        self._loss = 0.0
        self._metrics: dict[str, float] = {}

    def start(self) -> APIFuture[ForwardBackwardOutput]:
        LOOP.call_soon(self._stream.submit, self._call)
        return APIFuture(self._result.future, "forward_backward_custom")

    def _forwarded(self, future: "ConcurrentFuture[list[TrainResponse]]") -> None:
        """On the loop: the logprobs are here, or a forward failed."""
        if exc := future.exception():
            self._give_up(exc)
            return
        responses = future.result()
        self._losses.submit(lambda: self._evaluate(responses))

    def _evaluate(self, responses: list[TrainResponse]) -> None:
        """On the loss thread: the user's function."""
        try:
            self._forward_output = output = answers.forward_output(responses)
            outputs = output.loss_fn_outputs
            gradients_T, self._loss, self._metrics = run_custom_loss(
                self._fn, self._data, outputs.arrays["logprobs"], outputs.cu_seqlens
            )
        except BaseException as exc:  # Whatever the user's function raised belongs to the future.
            LOOP.call_soon(self._give_up, exc)
            return
        LOOP.call_soon(self._send_backwards, gradients_T)

    def _send_backwards(self, gradients_T: np.ndarray) -> None:
        """On the loop: the gradients go back, before anything that waits for them."""
        start = 0
        backwards: list[Operation] = []
        for forward, count in zip(self._forwards, self._row_counts, strict=True):
            # Once, since those of all pieces are added up.
            metrics = {} if backwards else reported_metrics(self._metrics, self._loss)
            content = backward_content(forward.request.seq_id, gradients_T[start : start + count], metrics)
            backwards.append(self._result.operation(content))
            start += count
        self._stream.overtake(backwards)
        self._stream.close_call(self._call)

    def _give_up(self, exc: BaseException) -> None:
        """On the loop: no gradients will come; let the graphs go."""
        sent = [forward.request.seq_id for forward in self._forwards if forward.request.seq_id]
        if sent:
            cancel = ops.CancelRequest(forward_seq_ids=sent, taint=self._stream.barrier_waits())
            # Nobody waits for the answer; if it does not come, the graphs went with the run.
            self._stream.overtake(
                [Operation(TrainRequest(cancel=cancel), answered=lambda _: None, failed=lambda _: None)]
            )
        self._stream.close_call(self._call)
        self._result.fail(exc)

    def _output(self, backward_responses: list[TrainResponse]) -> ForwardBackwardOutput:
        return answers.custom_output(self._forward_output, backward_responses, self._loss, self._metrics)


def _forgotten(stream: RunStream, losses: LossThread) -> None:
    if not LOOP.lost:
        LOOP.call_soon(stream.leave, losses.stop)
