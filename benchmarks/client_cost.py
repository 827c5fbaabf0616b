"""Row about a custom loss on the client, from the answer's bytes to the gradients' bytes, beside the tinker SDK's code.

Both sides get the same logprobs as their own service would send them, run the same per-datum loss over their own
datums, and encode what their own service wants back. Nothing is sent.
"""

import importlib
import sys
from typing import Any

import numpy as np
import torch
from gradwire import Datum, ModelInput
from gradwire._client import answers
from gradwire._client.custom_loss import run_custom_loss
from gradwire._client.order import OutgoingOperation
from gradwire._client.requests import backward_content
from gradwire._wire.codec import tensor_message
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse
from service import nll
from side_by_side import Row, Setting, interleave, ms, ratio

NO_TINKER = "left out: no package tinker here; --tinker FOLDER says where one was installed (pip install --target)"


class Ours:
    """gradwire's client code."""

    def __init__(self, logprobs: np.ndarray, length: int) -> None:
        count = len(logprobs) // length
        tokens = np.arange(length)
        inputs = {"target_tokens": tokens, "weights": np.ones(length, np.float32)}
        self._data = [Datum(ModelInput.from_ints(tokens), dict(inputs)) for _ in range(count)]
        cu_seqlens = np.arange(count + 1) * length
        # In messages of 1 MiB of what was sent up, 16 bytes a token.
        per_message = max(1, (1 << 16) // length)
        self._answers: list[bytes] = []
        for start in range(0, count, per_message):
            stop = min(count, start + per_message)
            answer = ops.ForwardResponse(cu_seqlens=tensor_message(cu_seqlens[: stop - start + 1]))
            answer.loss_fn_outputs["logprobs"].CopyFrom(tensor_message(logprobs[start * length : stop * length]))
            self._answers.append(TrainResponse(seq_id=start + 1, forward=answer).SerializeToString())

    def run(self) -> None:
        """Answers to gradients."""
        responses = [TrainResponse.FromString(answer) for answer in self._answers]
        outputs = answers.forward_output(responses).loss_fn_outputs
        gradients, _, _ = run_custom_loss(nll, self._data, outputs.arrays["logprobs"], outputs.cu_seqlens)
        start = 0
        for response in responses:
            stop = start + len(response.forward.loss_fn_outputs["logprobs"].data) // 4
            content = backward_content(response.seq_id, gradients[start:stop])
            OutgoingOperation(TrainRequest(), lambda _: None, lambda _: None, content=content).encode()
            start = stop


class Tinker:
    """The tinker SDK's own: what its forward_backward_custom calls between the two requests."""

    def __init__(self, logprobs: np.ndarray, length: int) -> None:
        def load(name: str) -> Any:
            return importlib.import_module(f"tinker.{name}")

        self._types = load("types")
        self._decode = load("proto.response_conv").deserialize_forward_backward_output
        self._combine = load("lib.chunked_fwdbwd_helpers").combine_fwd_bwd_output_results
        self._evaluate = load("lib.public_interfaces.training_client").TrainingClient._compute_custom_loss
        self._encode = load("proto.request_conv").forward_backward_request_to_proto
        proto = load("proto.tinker_public_pb2")
        count = len(logprobs) // length
        tokens = np.arange(length)
        inputs = {"target_tokens": tokens, "weights": np.ones(length, np.float32)}
        self._data = [
            self._types.Datum(
                model_input=self._types.ModelInput.from_ints(tokens.tolist()),
                loss_fn_inputs={name: self._types.TensorData.from_numpy(value) for name, value in inputs.items()},
            )
            for _ in range(count)
        ]
        answer = proto.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
        record = answer.loss_fn_outputs.add()
        record.num_datums = count
        field = record.fields["logprobs"]
        field.data, field.dtype = logprobs.tobytes(), proto.DTYPE_FLOAT32
        field.offsets = (np.arange(count + 1, dtype=np.int64) * length * 4).tobytes()
        self._answer = answer.SerializeToString()

    def run(self) -> None:
        """Answers to gradients."""
        output = self._combine([self._decode(self._answer)])
        linear = self._evaluate(self._data, nll, output)
        batch = self._types.ForwardBackwardInput(data=linear.data, loss_fn="cross_entropy")
        request = self._types.ForwardBackwardRequest(forward_backward_input=batch, model_id="model", seq_id=1)
        self._encode(request).SerializeToString()


def client_cost(setting: Setting) -> list[Row]:
    """A million logprobs in datums of several lengths."""
    if setting.tinker is not None:
        sys.path.append(str(setting.tinker))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for length in (2000, 1000, 500) if not setting.quick else (20,):
        logprobs = -np.random.default_rng(0).random(setting.pick(1_000_000, 100), dtype=np.float32)
        ours = Ours(logprobs, length)
        what = f"client cost of {len(logprobs):,} logprobs in {len(logprobs) // length:,} datums, tinker's over ours"
        try:
            tinker = Tinker(logprobs, length)
        except ImportError:
            times = interleave({"ours": ours.run}, rounds=setting.rounds)
            rows.append(Row(what, f"{ms(times['ours'])}; {NO_TINKER}", "", "at least 8"))
            continue
        times = interleave({"ours": ours.run, "tinker": tinker.run}, rounds=2 * setting.rounds)
        figures = f"{ms(times['tinker'])} / {ms(times['ours'])}"
        rows.append(Row(what, figures, f"{ratio(times['tinker'], times['ours']):.1f}", "at least 8"))
    torch.set_num_threads(threads)
    return rows
