"""TuFT and its official client, in the environment they are installed in, for a row of peers.py.

Make that environment once, apart from ours; its vLLM is for sampling on GPUs, and is left out:

    python3 -m venv TUFT
    TUFT/bin/pip install --no-deps tuft==0.2.2
    TUFT/bin/pip install torch==2.13.0 peft==0.20.0 ray 'tinker<0.26' 'fastapi<0.137' 'uvicorn[standard]' typer \\
        omegaconf nvidia-ml-py psutil opentelemetry-{api,sdk,exporter-otlp} \\
        opentelemetry-instrumentation-{fastapi,logging}

On a machine without a GPU its one call of torch.cuda.reset_peak_memory_stats(), in backends/hf_training_model.py, has
to be guarded by hand. Ray is told of a GPU all the same, since TuFT asks for one.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

_KEY = "tml-benchmark"
_NAME = "llama"
"""TuFT goes by it when it looks for layers to adapt."""
_CONFIG = """
checkpoint_dir: {folder}/checkpoints
supported_models:
  - model_name: {name}
    model_path: {model}
    max_model_len: 4096
    capabilities: [training]
    training_backend: hf
    micro_batch_size: 4
authorized_users: {{{key}: somebody}}
persistence: {{mode: DISABLE}}
"""
_SERVER = """
import os, sys, ray
ray.init(num_gpus=1, num_cpus=os.cpu_count(), include_dashboard=False, _node_ip_address="127.0.0.1")
from tuft.cli import app
app(["launch", "--port", sys.argv[1], "--config", sys.argv[2], "--log-level", "warning"])
"""
_CLIENT = """
import sys, time
import numpy as np
import tinker
import torch

url, name, key, rank = sys.argv[1:]
client = tinker.ServiceClient(base_url=url, api_key=key).create_lora_training_client(
    base_model=name, rank=int(rank), train_unembed=False
)
adam = tinker.AdamParams(learning_rate=1e-6)

def data_of(lengths, vocab=4000):
    rng = np.random.default_rng(0)
    data = []
    for length in lengths:
        tokens = rng.integers(0, vocab, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, dtype=np.float32)}
        inputs = {name: tinker.TensorData.from_numpy(value) for name, value in inputs.items()}
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data

def nll(data, logprobs_list):
    return -torch.stack([each.sum() for each in logprobs_list]).sum(), {}

print("ready", flush=True)
for line in sys.stdin:
    kind, *lengths = line.split()
    data = data_of(map(int, lengths))
    start = time.perf_counter()
    if kind == "custom":
        loss = client.forward_backward_custom(data, nll)
    else:
        loss = client.forward_backward(data, "cross_entropy")
    client.optim_step(adam).result()
    loss.result()
    print(time.perf_counter() - start, flush=True)
"""
Step = Callable[[str, list[int]], float]


@contextlib.contextmanager
def tuft(environment: Path, model: str, folder: Path, *, rank: int) -> Iterator[Step]:
    """Yields what makes a step of a LoRA run through TuFT: ("built-in" or "custom", lengths) to seconds.

    Args:
        environment: See the module's docstring.
        model: Folder of the base model, in the dtype that is computed in.
        folder: For its files.
        rank: Of the adapter, on the layers its client adapts: all but the head.
    """
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    config = folder / "tuft.yaml"
    config.write_text(_CONFIG.format(folder=folder, name=_NAME, model=model, key=_KEY))
    python, log = str(environment / "bin" / "python"), (folder / "tuft.log").open("w")
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH")
    }
    # Ray gives a process with no CPUs of its own one thread.
    env |= {
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
        "TUFT_HOME": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    server = subprocess.Popen([python, "-c", _SERVER, str(port), str(config)], env=env, stdout=log, stderr=log)
    client = None
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            if server.poll() is not None:
                sys.exit(f"TuFT did not start:\n{Path(log.name).read_text()[-2000:]}")
            time.sleep(0.5)
        command = [python, "-c", _CLIENT, url, _NAME, _KEY, str(rank)]
        client = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        pipe_in, pipe_out = client.stdin, client.stdout
        assert pipe_in is not None
        assert pipe_out is not None

        def ask(line: str) -> str:
            pipe_in.write(line)
            pipe_in.flush()
            if not (answer := pipe_out.readline()):
                sys.exit(f"TuFT failed:\n{Path(log.name).read_text()[-2000:]}")
            return answer

        ask("")
        yield lambda kind, lengths: float(ask(f"{kind} {' '.join(map(str, lengths))}\n"))
    finally:
        for process in filter(None, (client, server)):
            process.terminate()
            process.wait(60)
        log.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5) as response:
            return "status" in json.load(response)
    except (urllib.error.URLError, OSError, ValueError):
        return False
