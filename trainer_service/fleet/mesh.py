"""How ranks are arranged: checked before any is started."""

from trainer_service.command_lines import SettingsError
from trainer_service.worker_config import RankSettings


def check_mesh(settings: RankSettings, *, local_world_size: int, nnodes: int) -> None:
    """Refuses sizes that do not come to as many ranks as there are.

    Args:
        settings: --fsdp-size and --dp-replicate-size, and sizes that are not to be had yet.
        local_world_size: Ranks on each machine.
        nnodes: Machines.

    Raises:
        SettingsError: Says what would fit.
    """
    for option, size, what in (
        ("--tp-size", settings.tp_size, "Tensor parallel"),
        ("--ep-size", settings.ep_size, "Expert parallel"),
    ):
        if size != 1:
            raise SettingsError(
                f"{option} is {size}, and must be 1. {what} is not there yet; --fsdp-size and --dp-replicate-size are."
            )
    ranks = local_world_size * nnodes
    have = f"there are {ranks} ranks" if ranks > 1 else "there is 1 rank"
    if nnodes > 1:
        have += f", {local_world_size} on each of {nnodes} machines"
    times = settings.dp_replicate_size
    if settings.fsdp_size is None:
        if ranks % times:
            raise SettingsError(
                f"--dp-replicate-size is {times}, and {have}; it must divide them: one of {_divisors(ranks)}."
            )
    elif settings.fsdp_size * times != ranks:
        size = settings.fsdp_size
        fits = ranks % size == 0
        instead = f"--dp-replicate-size {ranks // size}" if fits else f"an --fsdp-size of {_divisors(ranks)}"
        raise SettingsError(
            f"--fsdp-size {size} times --dp-replicate-size {times} is {size * times}, and {have}; give {instead}."
        )


def _divisors(number: int) -> str:
    *others, last = (str(each) for each in range(1, number + 1) if number % each == 0)
    return f"{', '.join(others)} or {last}" if others else last
