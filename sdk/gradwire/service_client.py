"""The way in: connects to a trainer and makes training clients."""

import logging
import os
import uuid
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

from gradwire._client import answers
from gradwire._client.async_twins import off_thread
from gradwire._client.downloads import get_checkpoint
from gradwire._client.lora_settings import lora_arguments, lora_settings, tell_of_kinds_left_out
from gradwire._client.ported_names import NO_ACCESS_TOKENS, RefusesTinkerNames, refuse_given, refuse_other_optimizer
from gradwire._client.run_metrics import RunMetrics, fetch_metrics
from gradwire._client.tls import ClientTls
from gradwire._client.trainer_info import get_server_info, wait_until_ready
from gradwire._client.transport import Connection
from gradwire._client.user_metadata import check_user_metadata
from gradwire._wire.arguments import check_whole_number
from gradwire.checkpoint_client import CheckpointClient
from gradwire.futures import APIFuture
from gradwire.rest_client import RestClient
from gradwire.sampling_client import SamplingClient, open_sampling_client
from gradwire.training_client import TrainingClient
from gradwire.types import ReplayReport
from gradwire.types.params import MAX_LORA_RANK
from gradwire.types.run_info import ListedRun, ServerCapabilities
from gradwire.types.server_info import ServerInfo
from gradwire.v1.trainer_service_pb2 import (
    CreateRunRequest,
    ForkRunRequest,
    GetRunRequest,
    ListRunsRequest,
    ReplayRunRequest,
)
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

logger = logging.getLogger("gradwire")


class ServiceClient(RefusesTinkerNames):
    """A connection to one trainer.

    Every call has an `…_async` twin for coroutines, which leaves the event loop to others while it waits.

    Args:
        base_url: "http://host:port" (plaintext gRPC) or "https://host" (TLS); None reads GRADWIRE_BASE_URL.
        api_key: The trainer's key; None reads GRADWIRE_API_KEY. Without either, none is sent.
        tls: PEM files for "https://": your own roots, a client certificate; None reads GRADWIRE_TLS_CA_FILE,
            GRADWIRE_TLS_CERT_FILE and GRADWIRE_TLS_KEY_FILE, and without them trusts the system's roots.
        timeout_s: For each blocking call, its retries included, seconds.
        reconnect_timeout_s: How long a training client tries to reach a lost trainer before its futures fail, seconds.
        user_metadata: Your notes on the runs made here, texts by name, added to those given with each run.
        display_name: Your name for runs made here that are given none.
        project_id: Must be None: there are no projects.

    Attributes:
        checkpoints: What runs saved, those of deleted runs included; see CheckpointClient.

    Raises:
        ValueError: No base_url, or one that names no server.
        InvalidArgumentError: user_metadata is no mapping of texts; a project_id.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        tls: ClientTls | None = None,
        timeout_s: float = 600.0,
        reconnect_timeout_s: float = 120.0,
        user_metadata: Mapping[str, str] | None = None,
        display_name: str | None = None,
        project_id: str | None = None,
    ) -> None:
        base_url = base_url or os.environ.get("GRADWIRE_BASE_URL")
        if not base_url:
            raise ValueError('base_url is missing; pass "http://host:port" or set GRADWIRE_BASE_URL.')
        refuse_given("there are no projects; runs belong to the key that made them.", project_id=project_id)
        self.base_url = base_url
        self._user_metadata = check_user_metadata(user_metadata)
        self._display_name = display_name or ""
        self._connection = Connection(base_url, api_key or os.environ.get("GRADWIRE_API_KEY"), tls=tls)
        self.checkpoints = CheckpointClient(self._connection, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._clients: weakref.WeakSet[TrainingClient] = weakref.WeakSet()

    def create_training_client(
        self,
        base_model: str = "",
        lora_rank: int = 0,
        *,
        lora_alpha: float | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        adapter_path: str = "",
        display_name: str = "",
        user_metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> TrainingClient:
        """Makes a run from the base model, waiting until the trainer has loaded it.

        Args:
            base_model: Must be what the trainer serves; "" takes that.
            lora_rank: 0 trains all parameters; above 0 an adapter of that rank, beside a base model that all such runs
                share.
            lora_alpha: The adapter is scaled by lora_alpha / lora_rank; None is 32.
            seed: Seed of the adapter's first matrices; None is 0. The second ones are zero, so training starts from the
                base model.
            train_mlp: Adapt the feed-forward layers; None means True.
            train_attn: Adapt the attention layers; None means True.
            train_unembed: Adapt the head, the layer that makes logits; None means True.
            adapter_path: Starts from an adapter instead, with its own rank, alpha and layers: the path that
                save_weights_for_sampler of a LoRA run returned, or a folder saved by peft below the trainer's
                --adapter-dir.
            display_name: Your name for the run; "" takes the client's.
            user_metadata: Your notes on it, texts by name, added to the client's; get_info() and list_runs() return
                them. See get_server_info().limits.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            InvalidArgumentError: A LoRA setting out of range or without lora_rank, an adapter of another model.
            NotFoundError: There is no such adapter.
            FailedPreconditionError: BASE_MODEL_MISMATCH names both models; PROTOCOL_VERSION_UNSUPPORTED both versions.
        """
        layers = {"train_mlp": train_mlp, "train_attn": train_attn, "train_unembed": train_unembed}
        settings = lora_settings(lora_rank, lora_alpha, seed, layers)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        wait_until_ready(self._connection, timeout_s)
        request = CreateRunRequest(
            request_id=uuid.uuid4().hex,
            base_model=base_model,
            display_name=display_name or self._display_name,
            user_metadata={**self._user_metadata, **check_user_metadata(user_metadata)},
            adapter_path=adapter_path,
            **settings,
        )
        answer = self._connection.call(TrainerServiceStub, "CreateRun", request, timeout_s=timeout_s)
        if lora_rank:
            tell_of_kinds_left_out(layers, answer.run)
        return self._client(answer.run, timeout_s)

    def create_lora_training_client(
        self,
        base_model: str = "",
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: Any = None,
        *,
        lora_alpha: float | None = None,
        display_name: str = "",
        timeout_s: float | None = None,
    ) -> TrainingClient:
        """As create_training_client with lora_rank=rank, under the names users of tinker know.

        Args:
            base_model: As in create_training_client.
            rank: Rank of the adapter.
            seed: As in create_training_client.
            train_mlp: As in create_training_client.
            train_attn: As in create_training_client.
            train_unembed: As in create_training_client.
            user_metadata: As in create_training_client.
            optimizer: None or tinker's AdamOptimizerConfig: runs are trained with AdamW.
            lora_alpha: As in create_training_client.
            display_name: As in create_training_client.
            timeout_s: As in create_training_client.
        """
        refuse_other_optimizer("optimizer", optimizer)
        check_whole_number("rank", rank, at_least=1, at_most=MAX_LORA_RANK)
        return self.create_training_client(
            base_model,
            rank,
            lora_alpha=lora_alpha,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            user_metadata=user_metadata,
            display_name=display_name,
            timeout_s=timeout_s,
        )

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: Any = None,
        *,
        display_name: str = "",
        timeout_s: float | None = None,
    ) -> TrainingClient:
        """Makes a run that begins with the parameters of a saved state; its optimizer starts anew.

        Of a LoRA run's state it makes a LoRA run of the same rank, alpha and layers.

        Args:
            path: As save_state returned it.
            base_model: Must be what the trainer serves; None or "" takes that.
            user_metadata: As in create_training_client.
            weights_access_token: Must be None: a key opens its owner's checkpoints, and no others.
            optimizer: As in create_lora_training_client.
            display_name: Your name for the run; "" takes the client's.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            NotFoundError: There is no such state.
            FailedPreconditionError: CHECKPOINT_MISMATCH: it is of another model than the trainer's, or of a LoRA
                run and does not say of which layers.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        refuse_given(NO_ACCESS_TOKENS, weights_access_token=weights_access_token)
        refuse_other_optimizer("optimizer", optimizer)
        made = {"base_model": base_model or "", "user_metadata": user_metadata, "display_name": display_name}
        return self._from_state(path, made, timeout_s, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        display_name: str = "",
        timeout_s: float | None = None,
    ) -> TrainingClient:
        """As create_training_client_from_state, with the optimizer's state: training goes on where it was saved."""
        refuse_given(NO_ACCESS_TOKENS, weights_access_token=weights_access_token)
        made = {"base_model": base_model or "", "user_metadata": user_metadata, "display_name": display_name}
        return self._from_state(path, made, timeout_s, with_optimizer=True)

    def _from_state(
        self, path: str, made: dict[str, Any], timeout_s: float | None, *, with_optimizer: bool
    ) -> TrainingClient:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        state = get_checkpoint(self._connection, path, timeout_s=timeout_s)
        client = self.create_training_client(timeout_s=timeout_s, **made, **lora_arguments(state))
        try:
            load = client.load_state_with_optimizer if with_optimizer else client.load_state
            load(path).result(timeout_s)
        except BaseException:
            # The caller never learns of this run.
            client.delete_run()
            raise
        return client

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        *,
        timeout_s: float | None = None,
    ) -> SamplingClient:
        """A client of a sampler, waiting until the trainer has loaded it.

        Args:
            model_path: gradwire:// path that save_weights_for_sampler returned, or of frozen weights, of your own runs.
            base_model: Without a model_path: must be what the trainer serves; None or "" takes that.
            retry_config: Must be None: calls are tried again until they time out.
            record_stability_info: Must be False: there is no loss that reads it.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            InvalidArgumentError: model_path is no such path.
            NotFoundError: RUN_NOT_FOUND, SAMPLER_NOT_FOUND or CHECKPOINT_NOT_FOUND.
            FailedPreconditionError: BASE_MODEL_MISMATCH names both models. CHECKPOINT_MISMATCH: of another base model.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        wait_until_ready(self._connection, timeout_s)
        return open_sampling_client(
            self._connection,
            model_path=model_path or "",
            base_model=base_model or "",
            retry_config=retry_config,
            record_stability_info=record_stability_info,
            timeout_s=timeout_s,
        )

    def training_client(self, run_id: str, *, timeout_s: float | None = None) -> TrainingClient:
        """A client of a run that exists, such as after a script's restart. A client still attached loses the run."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        answer = self._connection.call(TrainerServiceStub, "GetRun", GetRunRequest(run_id=run_id), timeout_s=timeout_s)
        return self._client(answer.run, timeout_s)

    def fork_run(
        self, run_id: str, step: int | None = None, *, display_name: str = "", timeout_s: float | None = None
    ) -> TrainingClient:
        """Makes a run with the state another one had after a step. The other is unchanged, and may go on meanwhile.

        Args:
            run_id: The run to fork.
            step: Number of optimizer steps applied in the state to copy; None takes as many as the run has now. If the
                run was at that step several times, since it loaded a state, the last time is meant.
            display_name: Your name for the new run.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            InvalidArgumentError: The run's journal does not have that step; the message says which it has.
            FailedPreconditionError: RUN_LOST: the journal, or a snapshot, that far back has been removed.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        request = ForkRunRequest(run_id=run_id, step=step, request_id=uuid.uuid4().hex, display_name=display_name)
        answer = self._connection.call(TrainerServiceStub, "ForkRun", request, timeout_s=timeout_s)
        return self._client(answer.run, timeout_s)

    def replay_run(self, run_id: str, *, timeout_s: float | None = None) -> ReplayReport:
        """Executes a run's journal again in a copy, and compares every answer with the recorded one.

        On one CPU setup a run replays bit for bit; on other devices, and after a change of software, it may not. The
        copy is on the worker until the call returns.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        found = self._connection.call(
            TrainerServiceStub, "ReplayRun", ReplayRunRequest(run_id=run_id), timeout_s=timeout_s
        )
        return answers.replay_report(found)

    def _client(self, run: Any, timeout_s: float) -> TrainingClient:
        # Asked again: the model's limits are known only once it is loaded, and a run says that it is.
        info = self.get_server_info(timeout_s=timeout_s)
        client = TrainingClient(
            self._connection, run, info, reconnect_timeout_s=self._reconnect_timeout_s, made=self._clients.add
        )
        self._clients.add(client)
        return client

    def get_server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Versions, model, losses and limits of the trainer.

        Raises:
            FailedPreconditionError: PROTOCOL_VERSION_UNSUPPORTED: the trainer does not speak our version.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return get_server_info(self._connection, timeout_s)

    def list_runs(self, *, timeout_s: float | None = None) -> list[ListedRun]:
        """The trainer's runs that the key may see, newest first."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        answer = self._connection.call(TrainerServiceStub, "ListRuns", ListRunsRequest(), timeout_s=timeout_s)
        return [answers.listed_run(run) for run in answer.runs]

    def metrics(
        self, run_id: str, names: Iterable[str] = (), *, since_step: int = 0, timeout_s: float | None = None
    ) -> RunMetrics:
        """What a run's operations measured, one point for each optimizer step from the first on, whichever script or
        trainer made it.

        `metrics(run_id)["loss:sum"]` is a float64 array beside `.step`. What one step's operations said is combined as
        their names say (`name:sum` adds up, `name:mean` is weighted by loss tokens); metrics of a custom loss under
        names without a reduction are averaged. There are also "learning_rate", "queue_ms:sum", "execute_ms:sum" and
        "transfer_ms:sum"; what a `forward` with a loss found is "forward/loss:sum" and so on.

        Args:
            run_id: The run; a TrainingClient's is its `run_id`.
            names: Only these metrics; none given means all.
            since_step: Only points of this optimizer step and later ones.
            timeout_s: Longest wait for one piece of the answer, seconds; None takes the client's.

        Raises:
            NotFoundError: RUN_NOT_FOUND: there is none, or it is somebody else's.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return fetch_metrics(self._connection, run_id, names, since_step=since_step, timeout_s=timeout_s)

    def get_server_capabilities(self, *, timeout_s: float | None = None) -> ServerCapabilities:
        """The model the trainer serves, waiting until it is loaded; get_server_info() says more."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        wait_until_ready(self._connection, timeout_s)
        return answers.server_capabilities(self.get_server_info(timeout_s=timeout_s))

    def create_rest_client(self) -> RestClient:
        """Runs and checkpoints under the names of tinker's RestClient; `checkpoints` and list_runs() say more."""
        return RestClient(self._connection, timeout_s=self._timeout_s)

    def close(self, status: str | None = None, detail: str | None = None) -> APIFuture[None]:
        """Closes the connection, and the training clients made from it.

        Args:
            status: How the loop ended, as users of tinker say it; it is logged here, and nowhere else.
            detail: Logged with the status.

        Returns:
            A future that is done.
        """
        if status is not None:
            logger.info("Closing the connection to %s: %s.", self.base_url, ", ".join(filter(None, (status, detail))))
        for client in list(self._clients):
            client.close()
        self._connection.close()
        closed: ConcurrentFuture[None] = ConcurrentFuture()
        closed.set_result(None)
        return APIFuture(closed, "close")

    create_training_client_async = off_thread(create_training_client)
    create_lora_training_client_async = off_thread(create_lora_training_client)
    create_training_client_from_state_async = off_thread(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = off_thread(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = off_thread(create_sampling_client)
    training_client_async = off_thread(training_client)
    fork_run_async = off_thread(fork_run)
    replay_run_async = off_thread(replay_run)
    get_server_info_async = off_thread(get_server_info)
    get_server_capabilities_async = off_thread(get_server_capabilities)
    list_runs_async = off_thread(list_runs)
    metrics_async = off_thread(metrics)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A ServiceClient cannot be pickled or copied: its connections are this process's. Hand on its base_url and "
            "make another one there, or pickle a SamplingClient."
        )

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


FiretitanServiceClient = ServiceClient
