"""MLflow and Weights & Biases as they are, on this machine alone. Each in a process of its own: they start services and
threads, and warn, as they please."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LOG = """
from gradwire import loggers
with loggers.{logger} as log:
    log({{"loss:sum": 2.0}}, step=1)
    log({{"loss:sum": 1.5, "reward": 3.0}}, step=2)
"""
READ_MLFLOW = """
import mlflow
client = mlflow.MlflowClient(tracking_uri={uri!r})
for name in ("loss_sum", "reward"):
    print(name, [(metric.step, metric.value) for metric in client.get_metric_history(log.run_id, name)])
run = client.get_run(log.run_id)
print(run.info.status, run.info.run_name, client.get_experiment(run.info.experiment_id).name)
"""
READ_WANDB = """
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
log_file = next(Path({folder!r}).rglob("*.wandb")).read_bytes()
record, place = b"", 7
while place + 7 <= len(log_file):
    # LevelDB's log format: checksum of four bytes, length of two, kind of one; pieces do not cross blocks of 32 KiB.
    length, kind = int.from_bytes(log_file[place + 4 : place + 6], "little"), log_file[place + 6]
    record += log_file[place + 7 : place + 7 + length]
    place += 7 + length
    if 32768 - place % 32768 < 7:
        place += 32768 - place % 32768
    if kind in (1, 4):
        found, record = Record.FromString(record), b""
        items = {{(item.key or item.nested_key[0]): item.value_json for item in found.history.item}}
        if items:
            print(items["_step"], items["loss:sum"], items.get("reward"))
"""


def output(code: str, folder: Path, **variables: str) -> str:
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; see the dev extra")


@needs("mlflow")
def test_mlflow_has_what_was_logged(tmp_path: Path):
    uri = str(tmp_path / "mlruns")
    code = LOG.format(logger=f"MlflowLogger('sums', run_name='first', tracking_uri={uri!r})")
    printed = output(code + READ_MLFLOW.format(uri=uri), tmp_path, MLFLOW_ALLOW_FILE_STORE="true").splitlines()
    assert printed[-3:] == ["loss_sum [(1, 2.0), (2, 1.5)]", "reward [(2, 3.0)]", "FINISHED first sums"]


@needs("wandb")
def test_wandb_writes_what_was_logged_without_a_network(tmp_path: Path):
    code = LOG.format(logger=f"WandbLogger(project='sums', mode='offline', dir={str(tmp_path)!r})")
    output(code, tmp_path)
    printed = output(READ_WANDB.format(folder=str(tmp_path)), tmp_path).splitlines()
    assert [line.split() for line in printed[-2:]] == [["1", "2", "None"], ["2", "1.5", "3"]]
