"""gradwire: runs and checkpoints of a trainer from a terminal. Tables for people, --json for programs.

`gradwire serve`, `worker`, `jobs` and `gateway` are the server's: _client/server_commands.py hands them on.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradwire._client.answers import run_state_name
from gradwire._client.downloads import download, export, get_checkpoint
from gradwire._client.run_metrics import METRICS_OF_INTEREST, fetch_metrics, write_csv
from gradwire._client.server_commands import SERVER_COMMANDS, run_server_command
from gradwire._client.terminal import (
    ProgressBar,
    as_json,
    json_numbers,
    metadata_text,
    print_json,
    print_message,
    print_table,
    say,
    size_text,
    time_text,
)
from gradwire._client.tls import ClientTls
from gradwire._client.transport import Connection
from gradwire._wire.protocol_version import __version__
from gradwire._wire.untrusted import stays_inside
from gradwire.errors import GradwireError, UnavailableError
from gradwire.v1 import checkpoint_pb2
from gradwire.v1 import checkpoint_service_pb2 as checkpoints
from gradwire.v1 import trainer_service_pb2 as trainer
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
"""A person waits for it; a script's own client is more patient."""
_REPLAY_TIMEOUT_S = 24 * 3600.0
_METRICS_SHOWN = 30
"""Steps of a run that a table for people has."""
_MAX_UINT64 = (1 << 64) - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where the trainer or the disk refused, 2 for wrong usage, 3 where a replay differed, 130 after
    Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # Names are anybody's; a terminal that cannot show one is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in SERVER_COMMANDS:
        return run_server_command(words)
    arguments = _parser().parse_args(words)
    try:
        tls = _tls(arguments)
        connection = Connection(
            arguments.base_url, arguments.api_key or None, tls=tls, connect_timeout_s=_CONNECT_TIMEOUT_S
        )
    except (ValueError, OSError) as exc:
        return _complain(exc, 2)
    try:
        code = arguments.command(connection, arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read it has seen enough (`| head`). What is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (GradwireError, OSError) as exc:
        return _complain(exc, 1)
    except KeyboardInterrupt as exc:
        say("gradwire: " + "; ".join(["stopped", *map(str, exc.args)]) + ".", out=sys.stderr)
        return 130
    finally:
        # A loop that is stuck on a disk ends with the process.
        with contextlib.suppress(GradwireError):
            connection.close()


def _complain(exc: Exception, code: int) -> int:
    text = str(exc)
    if isinstance(exc, OSError) and not isinstance(exc, GradwireError) and exc.filename is not None:
        text = f"{exc.filename}: {exc.strerror}."
    say(f"gradwire: {text}", out=sys.stderr)
    return code


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _runs_list(connection: Connection, arguments: argparse.Namespace) -> None:
    answer = connection.call(TrainerServiceStub, "ListRuns", trainer.ListRunsRequest(), timeout_s=_TIMEOUT_S)
    rows = [
        (run.run_id, run_state_name(run.state), str(run.step), time_text(run.created_at), run.display_name)
        for run in answer.runs
    ]
    _list(arguments, list(answer.runs), [("RUN", "STATE", "STEP", "CREATED", "NAME"), *rows])


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
    differs = answer.HasField("difference")
    if arguments.json:
        print_json(as_json(answer))
    else:
        found = answer.difference
        say(
            f"{arguments.run_id} differs at seq_id {found.seq_id} ({found.kind}, behind optimizer step {found.step})."
            if differs
            else f"{arguments.run_id} came out as it did."
        )
        print_message(answer)
    return 3 if differs else 0


def _metrics(connection: Connection, arguments: argparse.Namespace) -> None:
    found = fetch_metrics(
        connection, arguments.run_id, arguments.name, since_step=arguments.since_step, timeout_s=_TIMEOUT_S
    )
    if arguments.csv:
        write_csv(found, sys.stdout)
    elif arguments.json:
        print_json(list(map(json_numbers, found.rows())))
    else:
        rows = list(found.rows())
        left_out = max(0, len(rows) - _METRICS_SHOWN)
        # As many as fit are those of most interest to a person; --name says which, --csv and --json have all.
        names = arguments.name or [name for name in METRICS_OF_INTEREST if name in found.values]
        print_table(
            [
                ("STEP", *names),
                *((str(row["step"]), *(f"{row[n]:.4g}" if n in row else "" for n in names)) for row in rows[left_out:]),
            ]
        )
        if left_out:
            say(f"{left_out} earlier steps are left out; --csv and --json print all.")


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _checkpoints_list(connection: Connection, arguments: argparse.Namespace) -> None:
    request = checkpoints.ListCheckpointsRequest(run_id=arguments.run)
    found = list(connection.call(CheckpointServiceStub, "ListCheckpoints", request, timeout_s=_TIMEOUT_S).checkpoints)
    rows = [
        (
            one.path,
            "delta" if one.checkpoint_type == checkpoint_pb2.CHECKPOINT_TYPE_DELTA else "",
            str(one.step),
            size_text(one.size_bytes),
            time_text(one.created_at),
            time_text(one.expires_at) if one.HasField("expires_at") else "never",
            metadata_text(one.user_metadata),
        )
        for one in found
    ]
    _list(arguments, found, [("CHECKPOINT", "TYPE", "STEP", "SIZE", "CREATED", "EXPIRES", "METADATA"), *rows])


def _checkpoints_show(connection: Connection, arguments: argparse.Namespace) -> None:
    _show(arguments, get_checkpoint(connection, arguments.path))


def _checkpoints_delete(connection: Connection, arguments: argparse.Namespace) -> None:
    request = checkpoints.DeleteCheckpointRequest(path=arguments.path)
    connection.call(CheckpointServiceStub, "DeleteCheckpoint", request, timeout_s=_TIMEOUT_S)
    _say(arguments, f"Deleted {arguments.path}.", deleted=arguments.path)


def _fetch(fetch: Callable[..., checkpoint_pb2.Checkpoint]) -> Callable[[Connection, argparse.Namespace], None]:
    def command(connection: Connection, arguments: argparse.Namespace) -> None:
        # The path may have been copied from what a trainer said.
        name = arguments.path.rpartition("/")[2]
        folder = arguments.folder or Path(name if stays_inside(name) else "checkpoint")
        bar = ProgressBar()
        try:
            found = fetch(connection, arguments.path, folder, bar.update)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from here") from None
        except UnavailableError as exc:
            if bar.began:
                exc.message += " The same command goes on from here."
            raise
        finally:
            bar.close()
        # A delta's own size is not that of the folder it was made whole in.
        size = "" if fetch is export and found.base_path else f" ({size_text(found.size_bytes)})"
        _say(arguments, f"{found.path} is in {folder}{size}.", path=found.path, folder=str(folder.resolve()))

    return command


# ── printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _list(arguments: argparse.Namespace, found: list[Any], rows: list[tuple[str, ...]]) -> None:
    if arguments.json:
        print_json([as_json(one) for one in found])
    else:
        print_table(rows)


def _show(arguments: argparse.Namespace, message: Any) -> None:
    if arguments.json:
        print_json(as_json(message))
    else:
        print_message(message)


def _say(arguments: argparse.Namespace, text: str, **fields: str) -> None:
    if arguments.json:
        print_json(fields)
    else:
        say(text)


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tls(arguments: argparse.Namespace) -> ClientTls | None:
    """The PEM files given; those that are not come from the environment, certificate and key as a pair.

    Raises:
        ValueError: One of the pair is missing.
    """
    ca, cert, key = arguments.tls_ca_file, arguments.tls_cert_file, arguments.tls_key_file
    if (cert is None) != (key is None):
        raise ValueError("A client certificate needs both --tls-cert-file and --tls-key-file.")
    if ca is None and cert is None:
        return None
    tls = ClientTls.from_environment()
    if ca is not None:
        tls = dataclasses.replace(tls, ca_file=ca)
    return tls if cert is None else dataclasses.replace(tls, cert_file=cert, key_file=key)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8 text") from None
    return value


def _step(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) <= _MAX_UINT64):
        raise argparse.ArgumentTypeError(f"{value!r} is no number of optimizer steps; it must be 0 or more")
    return int(value)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument(
        "--base-url",
        type=_text,
        metavar="URL",
        default=os.environ.get("GRADWIRE_BASE_URL") or "http://127.0.0.1:7777",
        help="of the trainer; default: $GRADWIRE_BASE_URL or http://127.0.0.1:7777",
    )
    common.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get("GRADWIRE_API_KEY"), help="default: $GRADWIRE_API_KEY"
    )
    for name, text in (
        ("ca", "roots the trainer's certificate must come from"),
        ("cert", "certificate for a trainer that asks for one"),
        ("key", "the certificate's private key"),
    ):
        variable = f"$GRADWIRE_TLS_{name.upper()}_FILE"
        common.add_argument(
            f"--tls-{name}-file", type=Path, metavar="PEM", help=f"{text}, for https://; default: {variable}"
        )
    parser = argparse.ArgumentParser(prog="gradwire", description="Gradwire trainers, and their runs and checkpoints.")
    parser.add_argument("--version", action="version", version=f"gradwire {__version__}")
    nouns = parser.add_subparsers(
        required=True, metavar=f"{{{','.join([*SERVER_COMMANDS, 'runs', 'metrics', 'checkpoints', 'export'])}}}"
    )
    for name, text in SERVER_COMMANDS.items():
        # Only so that --help lists it; main() runs it before anything is parsed.
        nouns.add_parser(name, help=text)

    def verb(group: Any, name: str, command: Callable[..., object], text: str, *names: str) -> argparse.ArgumentParser:
        made = group.add_parser(name, parents=[common], help=text, description=text)
        made.set_defaults(command=command)
        for argument in names:
            made.add_argument(argument, type=_text)
        return made

    runs = nouns.add_parser("runs", help="list, show, delete, fork, replay").add_subparsers(required=True)
    verb(runs, "list", _runs_list, "Lists runs, newest first.")
    verb(runs, "show", _runs_show, "Shows one run.", "run_id")
    verb(runs, "delete", _runs_delete, "Deletes a run; its checkpoints stay.", "run_id")
    fork = verb(runs, "fork", _runs_fork, "Makes a new run with the state after a step of another.", "run_id")
    fork.add_argument(
        "--step", type=_step, help="optimizer steps in the state wanted, the last time it was so; default: now's"
    )
    fork.add_argument("--name", type=_text, default="", help="your name for the new run")
    replay = verb(runs, "replay", _runs_replay, "Executes a run's journal again and compares every answer.", "run_id")
    replay.add_argument("--verify", action="store_true", help="what it always does: exit with 3 at a difference")

    measured = verb(nouns, "metrics", _metrics, "Prints what a run measured, step by step.", "run_id")
    measured.add_argument("--csv", action="store_true", help="print CSV, all steps and metrics")
    measured.add_argument(
        "--name", type=_text, action="append", default=[], metavar="METRIC", help="only this one; may be repeated"
    )
    measured.add_argument("--since-step", type=_step, default=0, help="only this optimizer step and later ones")

    saved = nouns.add_parser("checkpoints", help="list, show, download, delete").add_subparsers(required=True)
    listed = verb(saved, "list", _checkpoints_list, "Lists checkpoints, newest first.")
    listed.add_argument("--run", type=_text, metavar="RUN_ID", default="", help="those of one run")
    verb(saved, "show", _checkpoints_show, "Shows one checkpoint and its files.", "path")
    verb(saved, "delete", _checkpoints_delete, "Deletes a checkpoint for good.", "path")
    fetched = verb(saved, "download", _fetch(download), "Fetches a checkpoint's files; goes on after a stop.", "path")
    fetched.add_argument("folder", nargs="?", type=Path, help="default: the checkpoint's name, here")
    whole = verb(nouns, "export", _fetch(export), "Fetches sampler weights as a Hugging Face folder.", "path")
    whole.add_argument("folder", nargs="?", type=Path, help="default: the checkpoint's name, here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
