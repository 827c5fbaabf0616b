"""Another key's run beside an attack: it trains before and after, and its numbers are those of an undisturbed run."""

from types import TracebackType

import gradwire

TARGETS = [2, 3, 4, 5]
STEPS_BEFORE, STEPS_AFTER = 2, 2


class Bystander:
    """A client with a run of its own. As a context manager it trains on entry and compares on exit.

    Every call blocks: a test whose server lives on the test's own event loop calls `start` and `check` through
    `asyncio.to_thread`.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, timeout_s: float = 60) -> None:
        self._service = gradwire.ServiceClient(base_url, api_key)
        self._timeout_s = timeout_s

    def start(self) -> None:
        """Trains one run to the end, for the numbers, and another one half-way."""
        self._undisturbed = self._train(self._service.create_training_client(), STEPS_BEFORE + STEPS_AFTER)
        self._client = self._service.create_training_client()
        self._losses = self._train(self._client, STEPS_BEFORE)

    def check(self) -> None:
        """Trains the second run to its end; every loss and gradient norm must be the first run's, bit for bit."""
        self._losses += self._train(self._client, STEPS_AFTER)
        assert self._losses == self._undisturbed

    def close(self) -> None:
        """Closes the client."""
        self._service.close()

    def __enter__(self) -> "Bystander":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if fault is None:
                self.check()
        finally:
            self.close()

    def _train(self, client: gradwire.TrainingClient, steps: int) -> list[tuple[dict[str, float], dict[str, float]]]:
        numbers = []
        for _ in range(steps):
            passed = client.forward_backward([_datum()], "cross_entropy")
            stepped = client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
            numbers.append(
                (dict(passed.result(self._timeout_s).metrics), dict(stepped.result(self._timeout_s).metrics))
            )
        return numbers


def _datum() -> gradwire.Datum:
    return gradwire.Datum(
        model_input=gradwire.ModelInput.from_ints([1, *TARGETS[:-1]]),
        loss_fn_inputs={"target_tokens": TARGETS, "weights": [0.0, 1.0, 1.0, 1.0]},
    )
