"""What saving gives back."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SaveWeightsResult:
    """Where exported parameters are.

    Attributes:
        path: gradwire://<run_id>/sampler_weights/<name>
        snapshot_name: The name under which it was saved.
        uri: The same place on the trainer's host: file:///…
        size_bytes: Size of all files.
    """

    path: str
    snapshot_name: str
    uri: str
    size_bytes: int


class SavedState(str):
    """Where a resumable state is: its path, gradwire://<run_id>/state/<name>, as text that load_state takes.

    Attributes:
        path: The same, for whoever knows it from save_weights_for_sampler's result.
    """

    __slots__ = ()

    @property
    def path(self) -> str:
        return str(self)
