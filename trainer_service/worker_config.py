"""Settings of a worker: options of the trainer that it passes on. Ground floor."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer_service.command_lines import option, options_of

RANK_STORE_VARIABLE = "GRADWIRE_RANK_STORE"
"""Environment variable with the path of the file where ranks of one machine meet; of several, of a socket to ask at."""

START_ID_VARIABLE = "GRADWIRE_START_ID"
"""Which start of a worker on several machines a rank belongs to; empty on one machine."""

SPARE_VARIABLE = "GRADWIRE_WORKER_SPARE"
"""Tells a worker to import its libraries and wait until something comes on stdin."""

HEARTBEAT_INTERVAL_S = 1.0
"""How often a ready worker sends a heartbeat."""

Checkpointing = Literal["auto", "on", "off"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
BaseDtype = Literal["auto", "float32", "bfloat16", "int8", "int4"]
QUANTIZED = ("int8", "int4")
"""Of BaseDtype those that bitsandbytes makes, on one rank."""
Resharding = Literal["auto", "always", "never"]
ProcessesPerNode = int | Literal["auto", "gpu"]
"""Ranks on each machine, or torchrun's words: "gpu" is as many as it has GPUs, "auto" 1 where it has none."""


def _processes_per_node(text: str) -> ProcessesPerNode:
    if text == "auto" or text == "gpu":
        return text
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f'is {text!r}; it must be at least 1, or "auto" or "gpu"')
    return int(text)


@dataclass(frozen=True)
class EngineSettings:
    """Memory and precision. On the CPU, where device and host memory are the same, adapters always stay."""

    compute_dtype: ComputeDtype = option(
        "auto",
        help="precision of matrix products; auto: float32 on the CPU, bfloat16 on CUDA. Parameters, gradients and "
        "optimizer state are always float32",
    )
    base_dtype: BaseDtype = option(
        "auto",
        help="linear layers of the base model, and experts; in bfloat16 they take half the memory and are frozen, so "
        "that only LoRA runs train. int8 and int4, of linear layers alone, take a quarter or an eighth and need "
        "bitsandbytes. auto: bfloat16 for the copy beside which adapters train, where that loses nothing since the "
        "model's files and products are in it; else float32",
    )
    max_pack_tokens: int = option(
        0,
        help="most tokens in one forward; 0 decides from memory. A longer sequence is a forward of its own",
        at_least=0,
    )
    max_held_graph_bytes: int = option(
        0,
        help="most memory for the graphs of custom losses; beyond it the oldest are dropped, and recomputed for "
        "their backward; 0 decides from memory",
        at_least=0,
    )
    max_device_adapter_bytes: int = option(
        0,
        help="most device memory for the adapters of LoRA runs, gradients and optimizer state included; beyond it "
        "idle ones wait in host memory; 0 decides from memory",
        at_least=0,
    )
    activation_checkpointing: Checkpointing = option(
        "auto",
        help="recompute activations in the backward instead of keeping them: less memory, more time; auto: for "
        "forwards that would not fit otherwise",
    )
    fsdp_reshard_after_forward: Resharding = option(
        "auto",
        help="with several ranks, whether a layer is gathered for each forward and each backward (always), or once for "
        "a batch, whose gradients are then summed over ranks once: less traffic, and a model's parameters and "
        "gradients whole on each rank meanwhile; auto: where they take a quarter of the memory at most",
    )
    sampling_reshard_after_forward: Resharding = option(
        "auto",
        help="with several ranks, whether each has what is sampled from whole (never), or layers are gathered for each "
        "token (always): no room is needed, and it is slower; auto: the latter where the whole takes more than half of "
        "the memory that training leaves",
    )


@dataclass(frozen=True)
class RankSettings:
    """How many processes the worker is on each machine."""

    nproc_per_node: ProcessesPerNode = option(
        "auto",
        help="worker processes (ranks) on each machine, which share the model and every batch; gpu: one for each GPU",
        default_is="every GPU, or 1 on the CPU and with --base-dtype int8 or int4",
        metavar="RANKS",
        parse=_processes_per_node,
    )
    fsdp_size: int | None = option(
        None,
        help="ranks that parameters, gradients and optimizer lie in parts on (FSDP); times --dp-replicate-size and "
        "--tp-size that is all of them",
        default_is="all ranks over --dp-replicate-size and --tp-size",
        metavar="RANKS",
        at_least=1,
    )
    dp_replicate_size: int = option(
        1,
        help="times that all parts are there (HSDP): only sums of gradients go between them, such as between machines",
        metavar="TIMES",
        at_least=1,
    )
    tp_size: int = option(
        1,
        help="ranks that compute each layer together, each with its part of it (tensor parallel)",
        metavar="RANKS",
        at_least=1,
    )
    ep_size: int = option(
        1,
        help="of the ranks that parameters lie in parts on, those that divide routed experts among them: tokens travel "
        "to their experts (expert parallel)",
        metavar="RANKS",
        at_least=1,
    )
    collective_timeout_s: float = option(
        600.0, help="ranks that wait for one of them for this long in an operation are all started again", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that a trainer serves and its worker loads."""

    base_model: str = option(help="hub id or folder of a Hugging Face causal LM", metavar="MODEL")
    served_model_name: str = option(
        "", help="name of the model that callers see, to hide its folder", default_is="--base-model", metavar="NAME"
    )
    max_context_length: int = option(0, help="longest sequence, in tokens; 0: the model's own limit", at_least=0)
    loss_module: str = option(
        "", help="Python module whose LOSSES are offered beside the built-in ones", metavar="MODULE"
    )
    engine: EngineSettings = options_of(EngineSettings, "memory and precision")
    ranks: RankSettings = options_of(RankSettings, "ranks")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ModelSettings):
    """Settings of a worker, the command line of its process."""

    checkpoint_dir: Path = option(help="folder of checkpoints, which trainer and worker share")
    max_runs: int = option(help="runs held at once", at_least=1)


@dataclass(frozen=True, kw_only=True)
class WorkerTimeouts:
    """How long the trainer waits for a silent worker."""

    start_timeout_s: float = option(
        300.0,
        name="worker-start-timeout-s",
        help="a worker that makes no progress for this long while it starts or loads its model is killed and started "
        "again; 0: never",
        at_least=0,
    )
    heartbeat_timeout_s: float = option(
        60.0,
        name="worker-heartbeat-timeout-s",
        help="a ready worker that sends no heartbeat for this long (stopped or hanging; a busy one does send) is "
        "killed and replaced, and its work is done again; 0: never",
        at_least=0,
    )
    spare_after_s: float = option(
        30.0,
        name="spare-worker-after-s",
        help="a worker that has been ready for this long gets a spare, which has its libraries imported, takes some "
        "300 MiB of host memory, and stands in for it within seconds should it die; 0: none",
        at_least=0,
    )
