"""The way in: connects to a trainer and makes training clients."""

import logging
import os
import time
import uuid
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

from gradwire.answers import run_state_name
from gradwire.async_twins import off_thread
from gradwire.checkpoint_client import CheckpointClient
from gradwire.downloads import get_checkpoint
from gradwire.errors import OperationTimeoutError, error
from gradwire.futures import APIFuture
from gradwire.ported_names import NO_ACCESS_TOKENS, RefusesTinkerNames, refuse_given, refuse_other_optimizer
from gradwire.rest_client import RestClient, server_capabilities
from gradwire.run_info import ServerCapabilities
from gradwire.run_metrics import RunMetrics, fetch_metrics
from gradwire.sampling_client import SamplingClient, open_sampling_client
from gradwire.training_client import TrainingClient
from gradwire.transport import ClientTls, Connection
from gradwire.types import ReplayDifference, ReplayReport
from gradwire.user_metadata import check_user_metadata
from gradwire.v1.checkpoint_pb2 import Checkpoint
from gradwire.v1.trainer_service_pb2 import (
    CreateRunRequest,
    ForkRunRequest,
    GetRunRequest,
    GetServerInfoRequest,
    GetServerInfoResponse,
    ListRunsRequest,
    ReplayRunRequest,
)
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub
from gradwire.version import PROTOCOL_VERSION, __version__

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
        user_metadata: Your own words about the runs made here, texts by name, beside what each is given itself.
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
            base_model: Must be what the trainer serves; "" takes whatever that is.
            lora_rank: 0 trains all parameters; above 0 an adapter of that rank, beside a base model that all such runs
                share.
            lora_alpha: The adapter is scaled by lora_alpha / lora_rank; None is 32.
            seed: Of the adapter's first matrices; None is 0. The second ones are zero, so training starts from the
                base model.
            train_mlp: Adapt the feed-forward layers; None does.
            train_attn: Adapt the attention layers; None does.
            train_unembed: Adapt the head, the layer that makes logits; None does.
            adapter_path: Starts from an adapter instead, with its own rank, alpha and layers: the path that
                save_weights_for_sampler of a LoRA run returned, or a folder saved by peft below the trainer's
                --adapter-dir.
            display_name: Your name for the run; "" takes the client's.
            user_metadata: Your own words about it, texts by name, beside the client's; get_info() and list_runs() tell
                them, and get_server_info().limits how much may be said.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            InvalidArgumentError: A LoRA setting out of range or without lora_rank, an adapter of another model.
            NotFoundError: There is no such adapter.
            FailedPreconditionError: BASE_MODEL_MISMATCH names both models; PROTOCOL_VERSION_UNSUPPORTED both versions.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        self._wait_until_ready(timeout_s)
        settings: dict[str, Any] = {
            "lora_alpha": lora_alpha,
            "seed": seed,
            "train_mlp": train_mlp,
            "train_attn": train_attn,
            "train_unembed": train_unembed,
        }
        request = CreateRunRequest(
            request_id=uuid.uuid4().hex,
            base_model=base_model,
            lora_rank=lora_rank,
            display_name=display_name or self._display_name,
            user_metadata={**self._user_metadata, **check_user_metadata(user_metadata)},
            adapter_path=adapter_path,
            # What is None is absent, and the trainer's default.
            **{name: value for name, value in settings.items() if value is not None},
        )
        answer = self._connection.call(TrainerServiceStub, "CreateRun", request, timeout_s=timeout_s)
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
            base_model: As there, and so are those not named here.
            rank: Of the adapter.
            seed: As there.
            train_mlp: As there.
            train_attn: As there.
            train_unembed: As there.
            user_metadata: As there.
            optimizer: None or tinker's AdamOptimizerConfig: runs are trained with AdamW.
            lora_alpha: As there.
            display_name: As there.
            timeout_s: As there.
        """
        refuse_other_optimizer("optimizer", optimizer)
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
        """Makes a run that begins with the parameters of a saved state; its optimizer starts afresh.

        Of a LoRA run's state it makes a LoRA run of the same rank, alpha and layers.

        Args:
            path: As save_state returned it.
            base_model: Must be what the trainer serves; None or "" takes whatever that is.
            user_metadata: As in create_training_client.
            weights_access_token: Must be None: one's own checkpoints are open to one's key, and no others are.
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
        client = self.create_training_client(timeout_s=timeout_s, **made, **_lora_arguments(state))
        try:
            load = client.load_state_with_optimizer if with_optimizer else client.load_state
            load(path).result(timeout_s)
        except BaseException:
            # Nobody will ever hear of this run.
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
            model_path: gradwire:// path that save_weights_for_sampler returned, or a snapshot's. One's own.
            base_model: Without a model_path: must be what the trainer serves; None or "" takes whatever that is.
            retry_config: Must be None: calls are tried again until they time out.
            record_stability_info: Must be False: there is no loss that reads it.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            InvalidArgumentError: model_path is no such path.
            NotFoundError: RUN_NOT_FOUND, SAMPLER_NOT_FOUND or CHECKPOINT_NOT_FOUND.
            FailedPreconditionError: BASE_MODEL_MISMATCH names both models. CHECKPOINT_MISMATCH: of another base model.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        self._wait_until_ready(timeout_s)
        return open_sampling_client(
            self._connection,
            model_path=model_path or "",
            base_model=base_model or "",
            retry_config=retry_config,
            record_stability_info=record_stability_info,
            timeout_s=timeout_s,
        )

    def training_client(self, run_id: str, *, timeout_s: float | None = None) -> TrainingClient:
        """Takes hold of a run that exists, after a script's restart for example. A client still attached is put off."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        answer = self._connection.call(TrainerServiceStub, "GetRun", GetRunRequest(run_id=run_id), timeout_s=timeout_s)
        return self._client(answer.run, timeout_s)

    def fork_run(
        self, run_id: str, step: int | None = None, *, display_name: str = "", timeout_s: float | None = None
    ) -> TrainingClient:
        """Makes a run with the state another one had after a step. The other is left as it is, and may go on meanwhile.

        Args:
            run_id: The run to fork.
            step: Optimizer steps applied in the state wanted; None takes as many as the run has now. Where the run was
                at that step several times, since it loaded a state, the last time is meant.
            display_name: Your name for the new run.
            timeout_s: Longest wait, seconds; None takes the client's.

        Raises:
            InvalidArgumentError: The run's journal does not have that step; the message says which it has.
            FailedPreconditionError: RUN_LOST: the journal, or a snapshot, that far back has been let go.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        request = ForkRunRequest(run_id=run_id, step=step, request_id=uuid.uuid4().hex, display_name=display_name)
        answer = self._connection.call(TrainerServiceStub, "ForkRun", request, timeout_s=timeout_s)
        return self._client(answer.run, timeout_s)

    def replay_run(self, run_id: str, *, timeout_s: float | None = None) -> ReplayReport:
        """Executes a run's journal again, aside, and compares every answer with the one it got.

        On one CPU setup a run replays bit for bit; on other devices, and after a change of software, it may not. While
        it lasts, a copy of the run is on the worker.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        found = self._connection.call(
            TrainerServiceStub, "ReplayRun", ReplayRunRequest(run_id=run_id), timeout_s=timeout_s
        )
        difference = None
        if found.HasField("difference"):
            names = ReplayDifference.__dataclass_fields__
            difference = ReplayDifference(**{name: getattr(found.difference, name) for name in names})
        return ReplayReport(found.after_seq_id, found.compared, found.not_compared, difference)

    def _wait_until_ready(self, timeout_s: float) -> None:
        """Waits until the trainer has loaded its model; says so if that takes a while."""
        start = time.monotonic()
        said = ""
        while not (info := self.get_server_info(timeout_s=timeout_s)).ready:
            waited_s = time.monotonic() - start
            if waited_s > timeout_s:
                raise OperationTimeoutError(
                    f"The trainer at {self.base_url} was not ready within {timeout_s:g} s: {info.status_message}."
                )
            if waited_s > 2 and info.status_message != said:
                said = info.status_message
                logger.info("Waiting for the trainer at %s: %s.", self.base_url, said)
            time.sleep(min(1.0, 0.1 + waited_s / 10))

    def _client(self, run: Any, timeout_s: float) -> TrainingClient:
        # Asked again: the model's limits are known only once it is loaded, and a run says that it is.
        info = self.get_server_info(timeout_s=timeout_s)
        client = TrainingClient(
            self._connection, run, info, reconnect_timeout_s=self._reconnect_timeout_s, made=self._clients.add
        )
        self._clients.add(client)
        return client

    def get_server_info(self, *, timeout_s: float | None = None) -> GetServerInfoResponse:
        """Versions, model, losses and limits of the trainer.

        Raises:
            FailedPreconditionError: PROTOCOL_VERSION_UNSUPPORTED: the trainer does not speak our version.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        info = self._connection.call(TrainerServiceStub, "GetServerInfo", GetServerInfoRequest(), timeout_s=timeout_s)
        if not info.min_protocol_version <= PROTOCOL_VERSION <= info.max_protocol_version:
            raise error(
                "PROTOCOL_VERSION_UNSUPPORTED",
                f"This SDK (gradwire {__version__}) speaks protocol version {PROTOCOL_VERSION}, but the trainer at "
                f"{self.base_url} (gradwire {info.software_version}) speaks {info.min_protocol_version} to "
                f"{info.max_protocol_version}. Install the same gradwire on both sides.",
                client=PROTOCOL_VERSION,
                server=info.max_protocol_version,
            )
        return info

    def list_runs(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """The trainer's runs, newest first: run_id, base_model, state, step, display_name, attached, user_metadata."""
        answer = self._connection.call(
            TrainerServiceStub, "ListRuns", ListRunsRequest(), timeout_s=timeout_s or self._timeout_s
        )
        return [
            {
                "run_id": run.run_id,
                "base_model": run.base_model,
                "state": run_state_name(run.state),
                "step": run.step,
                "display_name": run.display_name,
                "attached": run.attached,
                "user_metadata": dict(run.user_metadata),
            }
            for run in answer.runs
        ]

    def metrics(
        self, run_id: str, names: Iterable[str] = (), *, since_step: int = 0, timeout_s: float | None = None
    ) -> RunMetrics:
        """What a run's operations measured, one point an optimizer step, whole from its first: also of what other
        scripts, or trainers before this one, did.

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
        self._wait_until_ready(timeout_s)
        return server_capabilities(self.get_server_info(timeout_s=timeout_s))

    def create_rest_client(self) -> RestClient:
        """Runs and checkpoints under the names of tinker's RestClient; `checkpoints` and list_runs() say more."""
        return RestClient(self._connection, timeout_s=self._timeout_s)

    def close(self, status: str | None = None, detail: str | None = None) -> APIFuture[None]:
        """Closes the connection, and the training clients made from it.

        Args:
            status: How the loop ended, which users of tinker say; it is logged here, and nowhere else.
            detail: More of that.

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


def _lora_arguments(state: Checkpoint) -> dict[str, Any]:
    """Arguments of create_training_client that make a run which can load a state."""
    if not state.lora_rank:
        return {}
    if not state.HasField("lora"):
        raise error(
            "CHECKPOINT_MISMATCH",
            f"{state.path} was saved by a LoRA run of rank {state.lora_rank} and does not say which layers it adapts: "
            "it is of an older version, or its run was started from an adapter that no settings make. To go on, call "
            "create_training_client with the lora_… settings or the adapter_path of that run, and load_state or "
            "load_state_with_optimizer on the client.",
            path=state.path,
        )
    names = ("lora_alpha", "train_mlp", "train_attn", "train_unembed")
    return {"lora_rank": state.lora_rank, **{name: getattr(state.lora, name) for name in names}}


FiretitanServiceClient = ServiceClient
