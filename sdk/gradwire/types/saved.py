"""What saving gives back."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SaveWeightsResult:
    """Location of exported parameters.

    Attributes:
        path: gradwire://<run_id>/sampler_weights/<name>
        snapshot_name: The name under which it was saved.
        uri: The same location on the trainer's host: file:///…
        size_bytes: Size of all files.
    """

    path: str
    snapshot_name: str
    uri: str
    size_bytes: int


class SavedState(str):
    """Path of a resumable state, gradwire://<run_id>/state/<name>: a str that load_state takes.

    Attributes:
        path: The same string, as save_weights_for_sampler's result has one.
    """

    __slots__ = ()

    @property
    def path(self) -> str:
        return str(self)
