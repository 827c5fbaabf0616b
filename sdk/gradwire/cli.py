"""gradwire: runs and checkpoints of a trainer from a terminal. Tables for people, --json for programs."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from gradwire.downloads import download, export, get_checkpoint
from gradwire.errors import GradwireError
from gradwire.transport import Connection
from gradwire.v1 import checkpoint_pb2, run_pb2
from gradwire.v1 import checkpoint_service_pb2 as checkpoints
from gradwire.v1 import trainer_service_pb2 as trainer
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

_TIMEOUT_S = 60.0
_REPLAY_TIMEOUT_S = 24 * 3600.0
_LOG_INTERVAL_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where the trainer or the disk refused, 2 for wrong usage, 3 where a replay differed, 130 after
    Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        connection = Connection(arguments.base_url, arguments.api_key or None)
    except ValueError as exc:
        print(f"gradwire: {exc}", file=sys.stderr)
        return 2
    try:
        return arguments.command(connection, arguments) or 0
    except GradwireError as exc:
        print(f"gradwire: {exc.message}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"gradwire: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngradwire: stopped.", file=sys.stderr)
        return 130
    finally:
        connection.close()


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _runs_list(connection: Connection, arguments: argparse.Namespace) -> None:
    answer = connection.call(TrainerServiceStub, "ListRuns", trainer.ListRunsRequest(), timeout_s=_TIMEOUT_S)
    rows = [(run.run_id, _state(run), str(run.step), _when(run.created_at), run.display_name) for run in answer.runs]
    _print(arguments, list(answer.runs), ("RUN", "STATE", "STEP", "CREATED", "NAME"), rows)


def _runs_show(connection: Connection, arguments: argparse.Namespace) -> None:
    request = trainer.GetRunRequest(run_id=arguments.run_id)
    _show(arguments, connection.call(TrainerServiceStub, "GetRun", request, timeout_s=_TIMEOUT_S).run)


def _runs_delete(connection: Connection, arguments: argparse.Namespace) -> None:
    request = trainer.DeleteRunRequest(run_id=arguments.run_id)
    connection.call(TrainerServiceStub, "DeleteRun", request, timeout_s=_TIMEOUT_S)
    _say(arguments, f"Deleted {arguments.run_id}; its checkpoints stay.", deleted=arguments.run_id)


def _runs_fork(connection: Connection, arguments: argparse.Namespace) -> None:
    request = trainer.ForkRunRequest(
        run_id=arguments.run_id, step=arguments.step, display_name=arguments.name, request_id=os.urandom(16).hex()
    )
    _show(arguments, connection.call(TrainerServiceStub, "ForkRun", request, timeout_s=_REPLAY_TIMEOUT_S).run)


def _runs_replay(connection: Connection, arguments: argparse.Namespace) -> int:
    request = trainer.ReplayRunRequest(run_id=arguments.run_id)
    answer = connection.call(TrainerServiceStub, "ReplayRun", request, timeout_s=_REPLAY_TIMEOUT_S)
    _show(arguments, answer)
    return 3 if answer.HasField("difference") else 0


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _checkpoints_list(connection: Connection, arguments: argparse.Namespace) -> None:
    request = checkpoints.ListCheckpointsRequest(run_id=arguments.run)
    found = list(connection.call(CheckpointServiceStub, "ListCheckpoints", request, timeout_s=_TIMEOUT_S).checkpoints)
    rows = [
        (
            one.path,
            "delta" if one.checkpoint_type == checkpoint_pb2.CHECKPOINT_TYPE_DELTA else "",
            str(one.step),
            _size(one.size_bytes),
            _when(one.created_at),
            _when(one.expires_at) if one.HasField("expires_at") else "never",
        )
        for one in found
    ]
    _print(arguments, found, ("CHECKPOINT", "TYPE", "STEP", "SIZE", "CREATED", "EXPIRES"), rows)


def _checkpoints_show(connection: Connection, arguments: argparse.Namespace) -> None:
    _show(arguments, get_checkpoint(connection, arguments.path))


def _checkpoints_delete(connection: Connection, arguments: argparse.Namespace) -> None:
    request = checkpoints.DeleteCheckpointRequest(path=arguments.path)
    connection.call(CheckpointServiceStub, "DeleteCheckpoint", request, timeout_s=_TIMEOUT_S)
    _say(arguments, f"Deleted {arguments.path}.", deleted=arguments.path)


def _fetch(fetch: Callable[..., checkpoint_pb2.Checkpoint]) -> Callable[[Connection, argparse.Namespace], None]:
    def command(connection: Connection, arguments: argparse.Namespace) -> None:
        folder = arguments.folder or Path(arguments.path.rpartition("/")[2] or "checkpoint")
        try:
            found = fetch(connection, arguments.path, folder, _Bar().update)
        except KeyboardInterrupt:
            print("\ngradwire: the same command goes on from here.", file=sys.stderr)
            raise
        text = f"{found.path} is in {folder} ({_size(found.size_bytes)})."
        _say(arguments, text, path=found.path, folder=str(folder.resolve()))

    return command


class _Bar:
    """How far a download is: a bar that moves on a terminal, a line now and then elsewhere. On standard error."""

    def __init__(self) -> None:
        self._moving = sys.stderr.isatty()
        self._shown_s = 0.0

    def update(self, file: str, done_bytes: int, size_bytes: int) -> None:
        """See downloads.Progress."""
        now, last = time.monotonic(), done_bytes == size_bytes
        if not last and now - self._shown_s < (0.1 if self._moving else _LOG_INTERVAL_S):
            return
        self._shown_s = now
        share = done_bytes / size_bytes if size_bytes else 1.0
        text = f"{share:4.0%}  {_size(done_bytes)} of {_size(size_bytes)}  {file}"
        if self._moving:
            bar = "#" * int(share * 30)
            print(f"\r\x1b[K[{bar:<30}] {text}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


# ── printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_json(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _print(arguments: argparse.Namespace, found: list[Any], head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if arguments.json:
        print(json.dumps([_as_json(one) for one in found], indent=2))
        return
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(arguments: argparse.Namespace, message: Any) -> None:
    found = _as_json(message)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        if isinstance(value, list):
            print(f"{name}:")
            for one in value:
                print("  " + "  ".join(str(part) for part in one.values()))
        else:
            print(f"{name.ljust(width)}  {value}")


def _say(arguments: argparse.Namespace, text: str, **fields: str) -> None:
    print(json.dumps(fields) if arguments.json else text)


def _state(run: run_pb2.Run) -> str:
    return run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def _when(stamp: Any) -> str:
    return datetime.fromtimestamp(stamp.seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument(
        "--base-url",
        default=os.environ.get("GRADWIRE_BASE_URL") or "http://127.0.0.1:7777",
        help="of the trainer; default: $GRADWIRE_BASE_URL or http://127.0.0.1:7777",
    )
    common.add_argument("--api-key", default=os.environ.get("GRADWIRE_API_KEY"), help="default: $GRADWIRE_API_KEY")
    parser = argparse.ArgumentParser(prog="gradwire", description="Runs and checkpoints of a Gradwire trainer.")
    nouns = parser.add_subparsers(required=True, metavar="{runs,checkpoints,export}")

    def verb(group: Any, name: str, command: Callable[..., object], text: str, *names: str) -> argparse.ArgumentParser:
        made = group.add_parser(name, parents=[common], help=text, description=text)
        made.set_defaults(command=command)
        for argument in names:
            made.add_argument(argument)
        return made

    runs = nouns.add_parser("runs", help="list, show, delete, fork, replay").add_subparsers(required=True)
    verb(runs, "list", _runs_list, "Lists runs, newest first.")
    verb(runs, "show", _runs_show, "Shows one run.", "run_id")
    verb(runs, "delete", _runs_delete, "Deletes a run; its checkpoints stay.", "run_id")
    fork = verb(runs, "fork", _runs_fork, "Makes a new run with the state after a step of another.", "run_id")
    fork.add_argument(
        "--step", type=int, help="optimizer steps in the state wanted, the last time it was so; default: now's"
    )
    fork.add_argument("--name", default="", help="your name for the new run")
    replay = verb(runs, "replay", _runs_replay, "Executes a run's journal again and compares every answer.", "run_id")
    replay.add_argument("--verify", action="store_true", help="what it always does: exit with 3 at a difference")

    saved = nouns.add_parser("checkpoints", help="list, show, download, delete").add_subparsers(required=True)
    listed = verb(saved, "list", _checkpoints_list, "Lists checkpoints, newest first.")
    listed.add_argument("--run", default="", help="those of one run")
    verb(saved, "show", _checkpoints_show, "Shows one checkpoint and its files.", "path")
    verb(saved, "delete", _checkpoints_delete, "Deletes a checkpoint for good.", "path")
    fetched = verb(saved, "download", _fetch(download), "Fetches a checkpoint's files; goes on after a stop.", "path")
    fetched.add_argument("folder", nargs="?", type=Path, help="default: the checkpoint's name, here")
    whole = verb(nouns, "export", _fetch(export), "Fetches sampler weights as a Hugging Face folder.", "path")
    whole.add_argument("folder", nargs="?", type=Path, help="default: the checkpoint's name, here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
