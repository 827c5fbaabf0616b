"""The calls of a run that save and load."""

from collections.abc import Mapping
from typing import Any, Literal

from gradwire._client import answers
from gradwire._client.async_twins import awaited, off_thread, submitted
from gradwire._client.ported_names import NO_ACCESS_TOKENS, refuse_given
from gradwire._client.requests import dtype_name
from gradwire._client.run_calls import RunCalls
from gradwire._client.transport import Connection
from gradwire._client.user_metadata import check_user_metadata
from gradwire.checkpoint_client import check_ttl_seconds
from gradwire.errors import invalid_field
from gradwire.futures import APIFuture
from gradwire.sampling_client import LEASE_MS, NO_STABILITY_INFO, RETRIES_ITSELF, SamplingClient
from gradwire.types import SavedState, SaveWeightsResult
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_TYPE_BASE, CHECKPOINT_TYPE_DELTA
from gradwire.v1.trainer_service_pb2 import TrainRequest

_CHECKPOINT_TYPES = {"base": CHECKPOINT_TYPE_BASE, "delta": CHECKPOINT_TYPE_DELTA}


class SavingCalls:
    """The part of TrainingClient that saves and loads."""

    _connection: Connection
    _calls: RunCalls

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
            user_metadata: Your notes on it, texts by name, listed with it; see get_server_info().limits.
            merged: Of a LoRA run: a Hugging Face folder with the adapter added into the base model's weights.
            overwrite: Replace a checkpoint of that name; otherwise a taken name is refused (AlreadyExistsError).
            dtype: What a Hugging Face folder's parameters are written in, as a name or torch's own: "float32", as they
                train, without loss, or that of the base model's files, such as "bfloat16". None: the latter; of a
                delta, its base's. An adapter is written in float32.
        """
        request = TrainRequest(
            save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(
                name=name,
                overwrite=overwrite,
                merged=merged,
                dtype=dtype_name(dtype),
                ttl_seconds=check_ttl_seconds(ttl_seconds),
                user_metadata=check_user_metadata(user_metadata),
            )
        )
        return self._calls.send("save_weights_for_sampler", [request], answers.save_weights, barrier=True)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: Literal["snapshot"] = "snapshot",
    ) -> SamplingClient:
        """Freezes the parameters as they are at this place in the run's order, and returns a client that samples from
        them. They stay in the trainer's memory, and are copied only once training changes them.

        Returns at once: the client's calls, and its `.result()`, wait until the weights are frozen. A run has a few
        sets of them at most (get_server_info().limits.max_frozen_weights); a further one replaces the least recently
        used. They end with its run and with this client. They outlive a worker that dies: the next one gets them again,
        of the run's journal.

        Args:
            name: Has no effect; users of tinker pass one.
            retry_config: Must be None: calls are tried again until they time out.
            record_stability_info: Must be False: there is no loss that reads it.
            kind: "snapshot": make a new client after training to sample from newer parameters.

        Raises:
            InvalidArgumentError: An argument of tinker's that has no meaning here.
        """
        refuse_given(RETRIES_ITSELF, retry_config=retry_config)
        refuse_given(NO_STABILITY_INFO, record_stability_info=record_stability_info)
        if kind != "snapshot":
            raise invalid_field("kind", f'is {kind!r}; it must be "snapshot": make a new client after each step.')
        name = "save_weights_and_get_sampling_client"
        request = TrainRequest(
            save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(ephemeral=True, lease_ms=LEASE_MS)
        )
        source = self._calls.send(name, [request], answers.sampler_source, barrier=True)
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
            name: As in save_weights_for_sampler.
            checkpoint_type: "base", all parameters; "delta", only what changed since this run's newest base, without
                loss, smaller, and loadable as long as that base exists.
            overwrite: As in save_weights_for_sampler.
            merged: As in save_weights_for_sampler.
            dtype: As in save_weights_for_sampler.
            ttl_seconds: As in save_weights_for_sampler.
            user_metadata: As in save_weights_for_sampler.
            timeout_s: Longest wait, seconds; None waits until the save succeeds or fails.

        Raises:
            FailedPreconditionError: DELTA_BASE_UNUSABLE: no base was saved, or it is not as it was saved.
        """
        if checkpoint_type not in _CHECKPOINT_TYPES:
            raise invalid_field("checkpoint_type", f'is {checkpoint_type!r}; it must be "base" or "delta".')
        request = ops.SaveWeightsForSamplerRequest(
            name=name,
            overwrite=overwrite,
            merged=merged,
            checkpoint_type=_CHECKPOINT_TYPES[checkpoint_type],
            dtype=dtype_name(dtype),
            ttl_seconds=check_ttl_seconds(ttl_seconds),
            user_metadata=check_user_metadata(user_metadata),
        )
        sent = [TrainRequest(save_weights_for_sampler=request)]
        saved = self._calls.send("save_weights_for_sampler_ext", sent, answers.save_weights, barrier=True)
        return saved.result(timeout_s)

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
        request = ops.SaveStateRequest(
            name=name,
            overwrite=overwrite,
            ttl_seconds=check_ttl_seconds(ttl_seconds),
            user_metadata=check_user_metadata(user_metadata),
        )
        return self._calls.send("save_state", [TrainRequest(save_state=request)], answers.saved_state, barrier=True)

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[None]:
        """Loads the parameters of a saved state, of this run or another of yours; the optimizer starts afresh.

        Accumulated gradients are dropped. A state that does not fit (FailedPreconditionError), is not there
        (NotFoundError) or is damaged (DataLossError) changes nothing.

        Args:
            path: As save_state returned it.
            weights_access_token: Must be None: one's own checkpoints are open to one's key, and no others are.
        """
        return self._load("load_state", path, weights_access_token, with_optimizer=False)

    def load_state_with_optimizer(self, path: str, weights_access_token: str | None = None) -> APIFuture[None]:
        """As load_state, with the optimizer's state: training goes on as if it had never stopped."""
        return self._load("load_state_with_optimizer", path, weights_access_token, with_optimizer=True)

    def _load(self, name: str, path: str, weights_access_token: str | None, *, with_optimizer: bool) -> APIFuture[None]:
        refuse_given(NO_ACCESS_TOKENS, weights_access_token=weights_access_token)
        request = TrainRequest(load_state=ops.LoadStateRequest(path=path, with_optimizer=with_optimizer))
        return self._calls.send(name, [request], answers.nothing, barrier=True)

    save_weights_for_sampler_async = submitted(save_weights_for_sampler)
    save_weights_and_get_sampling_client_async = awaited(save_weights_and_get_sampling_client)
    save_weights_for_sampler_ext_async = off_thread(save_weights_for_sampler_ext)
    save_state_async = submitted(save_state)
    load_state_async = submitted(load_state)
    load_state_with_optimizer_async = submitted(load_state_with_optimizer)
