"""How ranks are arranged: checked before any is started."""

from trainer_service.command_lines import SettingsError
from trainer_service.worker_config import EngineSettings, RankSettings


def check_mesh(settings: RankSettings, *, local_world_size: int, nnodes: int) -> None:
    """Refuses sizes that do not come to as many ranks as there are.

    Args:
        settings: --fsdp-size, --dp-replicate-size, --tp-size and --ep-size.
        local_world_size: Ranks on each machine.
        nnodes: Machines.

    Raises:
        SettingsError: Says what would fit.
    """
    ranks = local_world_size * nnodes
    have = f"there are {ranks} ranks" if ranks > 1 else "there is 1 rank"
    if nnodes > 1:
        have += f", {local_world_size} on each of {nnodes} machines"
    tp_size, times = settings.tp_size, settings.dp_replicate_size
    if local_world_size % tp_size:
        whose = "those of a machine" if nnodes > 1 else "them"
        raise SettingsError(
            f"--tp-size is {tp_size}, and {have}; it must divide {whose}: one of {_divisors(local_world_size)}."
        )
    groups = ranks // tp_size
    if settings.fsdp_size is None:
        if groups % times:
            if tp_size > 1:
                have += f", {groups} groups of --tp-size {tp_size}"
            raise SettingsError(
                f"--dp-replicate-size is {times}, and {have}; it must divide them: one of {_divisors(groups)}."
            )
    elif settings.fsdp_size * times != groups:
        size = settings.fsdp_size
        fits = groups % size == 0
        instead = f"--dp-replicate-size {groups // size}" if fits else f"an --fsdp-size of {_divisors(groups)}"
        product = f"--fsdp-size {size} times --dp-replicate-size {times}"
        if tp_size > 1:
            product += f" times --tp-size {tp_size}"
        raise SettingsError(f"{product} is {size * times * tp_size}, and {have}; give {instead}.")
    _check_experts(settings, fsdp_size=groups // times)


def _check_experts(settings: RankSettings, *, fsdp_size: int) -> None:
    ep_size = settings.ep_size
    if ep_size > 1 and settings.tp_size > 1:
        raise SettingsError(
            f"--ep-size is {ep_size}, and --tp-size {settings.tp_size}; layers with experts are not cut yet: give one "
            "of them, and leave the other at 1."
        )
    if fsdp_size % ep_size:
        raise SettingsError(
            f"--ep-size is {ep_size}, and parameters lie in parts on {fsdp_size} rank{'s' * (fsdp_size > 1)} "
            f"(--fsdp-size); it must divide them: one of {_divisors(fsdp_size)}."
        )


def check_cut(settings: EngineSettings, *, tp_size: int) -> None:
    """Refuses what does not go with layers that are cut.

    Raises:
        SettingsError: Says what does.
    """
    if tp_size == 1:
        return
    if settings.base_dtype == "bfloat16":
        raise SettingsError(
            f"--base-dtype is bfloat16, and --tp-size {tp_size}; layers that are cut are kept in float32: give "
            "--base-dtype float32, or --fsdp-size in place of --tp-size."
        )
    if settings.sampling_reshard_after_forward == "always":
        raise SettingsError(
            f"--sampling-reshard-after-forward is always, and --tp-size {tp_size}; layers that are cut are gathered "
            "for sampling: give never or auto, or --fsdp-size in place of --tp-size."
        )


def _divisors(number: int) -> str:
    *others, last = (str(each) for each in range(1, number + 1) if number % each == 0)
    return f"{', '.join(others)} or {last}" if others else last
