"""A script that forks while its clients are in use, as torch's DataLoader does on Linux: parent and child."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bystander import Bystander
from tests.front_end_process import front_end_process

TIMEOUT_S = 60
"""For a script that takes a second or two; what hangs is killed and fails the test."""

BEGIN = """
import gc, json, multiprocessing, os, select, sys, time
import gradwire

def step(client):
    client.forward_backward([gradwire.datum_from_tokens_weights([1, 2, 3], [1.0] * 3)])
    return client.optim_step().result(60).step

def outcome(call):
    try:
        call()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "ok"

service = gradwire.ServiceClient("http://" + sys.argv[1], timeout_s=60)
"""

IN_USE = (
    BEGIN
    + """
client = service.create_training_client()
steps = [step(client)]
sampler = client.save_weights_and_get_sampling_client().result(60)
tokens = sampler.stream([1, 2, 3], 1, gradwire.SamplingParams(max_tokens=None))
next(tokens)                             # Under way in the parent, and never ends by itself.
pending = sampler.sample([1, 2, 3], 1, gradwire.SamplingParams(max_tokens=None))
calls = {
    "optim_step": lambda: client.optim_step(),
    "forward": lambda: client.forward([gradwire.datum_from_tokens_weights([1, 2, 3], [1.0] * 3)]),
    "custom": lambda: client.forward_backward_custom([gradwire.datum_from_tokens_weights([1, 2], [1.0] * 2)], print),
    "pending": lambda: pending.result(60),
    "sample": lambda: sampler.sample([1, 2, 3]),
    "stream": lambda: next(tokens),
    "server_info": lambda: service.get_server_info(),
    "checkpoints": lambda: service.checkpoints.list(),
    "another_client": lambda: gradwire.ServiceClient("http://" + sys.argv[1]).get_server_info(),
    "jobs": lambda: gradwire.TrainerJobManager(base_url="http://" + sys.argv[1]).list(),
    "embedded_jobs": lambda: gradwire.TrainerJobManager().create(gradwire.TrainerJobConfig("m")),
}

def in_child(write):
    # All that an inherited client can be used for, then forgotten, closed, and collected as garbage.
    global client, sampler, tokens, service, pending, calls
    said = {name: outcome(call) for name, call in calls.items()}
    said["close"] = outcome(lambda: (client.close(), sampler.close(), tokens.close(), service.close()))
    del client, sampler, tokens, service, pending, calls
    gc.collect()
    os.write(write, json.dumps(said).encode())

read, write = os.pipe()
"""
)

FORKS = {
    # Ends as a program does, with all that the interpreter clears away.
    "os.fork": """
if os.fork() == 0:
    in_child(write)
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.wait()[1])
""",
    "multiprocessing": """
child = multiprocessing.get_context("fork").Process(target=in_child, args=[write])
child.start()
child.join()
code = 7 if child.exitcode == 0 else child.exitcode
""",
    # One that lives on beside the parent, and is killed.
    "killed": """
child = os.fork()
if child == 0:
    in_child(write)
    time.sleep(600)
select.select([read], [], [])  # It has said all.
steps.append(step(client))
os.kill(child, 9)
code = 7 if os.waitstatus_to_exitcode(os.wait()[1]) == -9 else -1
""",
}

GO_ON = """
said = json.loads(os.read(read, 1 << 20))
steps += [step(client) for _ in range(3)]
more = [next(sampler.stream([1, 2, 3])).token, len(service.list_runs())]
print(json.dumps([code, said, steps, more]))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with front_end_process() as running:
        yield running.address


def run(script: str, address: str) -> Any:
    # As in a script of a user, which has imported nothing of ours before it starts.
    env = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        # Children that hang hold the pipes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert "Exception ignored" not in err
    return json.loads(out)


@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_child_is_told_at_once_and_the_parent_trains_on(address: str, fork: str):
    with Bystander(f"http://{address}"):
        code, said, steps, more = run(IN_USE + FORKS[fork] + GO_ON, address)
    assert code == 7, "the child did not end as it was to"
    assert said.pop("close") == "ok"
    assert len(said) == 11
    assert all(text.startswith("FailedPreconditionError: This process was forked") for text in said.values()), said
    assert all('get_context("spawn")' in text for text in said.values())
    assert steps == list(range(1, len(steps) + 1))
    assert more[0] == 7


MANY_CHILDREN = (
    IN_USE
    + """
for _ in range(40):
    future = client.optim_step() if client.forward_backward(
        [gradwire.datum_from_tokens_weights([1, 2, 3], [1.0] * 3)]) else None
    child = os.fork()
    if child == 0:
        os._exit(0)                      # One that never heard of Gradwire.
    assert os.waitpid(child, 0)[1] == 0
    steps.append(future.result(60).step)
print(json.dumps(steps))
"""
)


def test_a_parent_that_forks_at_every_step_trains_on(address: str):
    assert run(MANY_CHILDREN, address) == list(range(1, 42))


IDLE = (
    BEGIN
    + """
service.get_server_info()
for _ in range(5):
    child = os.fork()
    if child == 0:
        del service
        gc.collect()
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    service.get_server_info()
print(json.dumps(step(service.create_training_client())))
"""
)


def test_children_that_forget_what_they_inherit_end_and_leave_the_parents_connection_alone(address: str):
    assert run(IDLE, address) == 1


BEFORE_THE_FIRST_CALL = (
    BEGIN
    + """
children = []
for number in range(2):
    child = os.fork()
    if child == 0:
        client = service.create_training_client()
        sys.exit(10 + step(client))
    children.append(child)
client = service.create_training_client()
steps = [step(client) for _ in range(3)]
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps([codes, steps, step(client)]))
"""
)


def test_children_forked_before_the_first_call_connect_on_their_own(address: str):
    assert run(BEFORE_THE_FIRST_CALL, address) == [[11, 11], [1, 2, 3], 4]
