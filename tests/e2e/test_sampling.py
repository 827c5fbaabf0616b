"""Sampling beside training, end to end: the SDK, a trainer, a worker, a tiny model."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import gradwire
import pytest
from gradwire import SamplingClient, SamplingParams, ServiceClient, TrainingClient
from gradwire._client.loop import LOOP
from gradwire.errors import InvalidArgumentError, NotFoundError, OperationCancelledError, ResourceExhaustedError
from gradwire.v1.sampling_service_pb2 import Sampler, SampleRequest
from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceStub

from tests.grpcurl import ROOT, bash, documents
from tests.sampled import GREEDY, PROMPT, greedy, train
from tests.trainer_process import TrainerProcess


@pytest.fixture
def base(service: ServiceClient) -> Iterator[SamplingClient]:
    """A sampler of the base model."""
    with service.create_sampling_client() as made:
        yield made


def test_a_samples_logprobs_are_those_of_the_trainers_own_forward(client: TrainingClient):
    train(client)
    sampler = client.save_weights_and_get_sampling_client(name="ignored")
    response = sampler.sample(PROMPT, 3, SamplingParams(max_tokens=12, seed=4, stop=[]), True, 2).result(30)
    data = [
        gradwire.datum_from_tokens_weights(PROMPT + sequence.tokens, [1.0] * 16, 64) for sequence in response.sequences
    ]
    outputs = client.forward(data).result(30).loss_fn_outputs
    for sequence, output in zip(response.sequences, outputs, strict=True):
        trained = output["logprobs"].tolist()
        assert sequence.logprobs == pytest.approx(trained[3:], abs=1e-5)
        assert response.prompt_logprobs is not None
        assert response.prompt_logprobs[1:] == pytest.approx(trained[:3], abs=1e-5)
        assert sequence.stop_reason == "length"
    assert response.topk_prompt_logprobs is not None
    assert [len(pairs or ()) for pairs in response.topk_prompt_logprobs] == [0, 2, 2, 2]
    assert sampler.compute_logprobs(PROMPT).result(30) == response.prompt_logprobs


def test_what_is_asked_about_places_of_prompts_and_samples_is_answered(base: SamplingClient):
    params = SamplingParams(max_tokens=3, temperature=0, stop=[])
    whole = base.sample(PROMPT, 1, params, include_prompt_logprobs=True).result(30).prompt_logprobs
    assert whole is not None
    targets = gradwire.TensorData([[-1, -1], [42, -1], [43, 50]])
    found = base.sample(
        PROMPT,
        2,
        params,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=targets,
        prompt_logprobs_last_n=1,
    ).result(30)
    assert found.prompt_logprobs == [None, None, None, whole[3]]
    assert base.compute_logprobs(PROMPT, 1).result(30) == found.prompt_logprobs
    assert found.topk_prompt_logprobs is not None
    assert [pairs and len(pairs) for pairs in found.topk_prompt_logprobs] == [None, None, None, 3]
    assert found.topk_prompt_logprobs_np is not None
    assert found.topk_prompt_logprobs_np.token_ids.shape == (4, 3)
    assert found.target_prompt_logprobs is not None
    scored = found.target_prompt_logprobs.tolist()
    assert scored[0] == [0, 0]
    assert [scored[1][0], scored[2][0]] == pytest.approx(whole[2:], abs=1e-6)
    assert scored[1][1] == 0 > scored[2][1]
    for sequence in found.sequences:
        assert sequence.topk_logprobs is not None
        likeliest = [pairs[0] for pairs in sequence.topk_logprobs]
        assert [token for token, _ in likeliest] == sequence.tokens
        assert [logprob for _, logprob in likeliest] == pytest.approx(sequence.logprobs, abs=1e-6)
        assert sequence.topk_logprobs_np is not None
        assert sequence.topk_logprobs_np.logprobs.shape == (3, 2)


def test_a_sampler_is_frozen_while_training_and_loading_go_on(service: ServiceClient, client: TrainingClient):
    base = greedy(service.create_sampling_client())
    first = client.save_weights_and_get_sampling_client()
    client.save_state("start").result(30)
    train(client)
    second = client.save_weights_and_get_sampling_client()
    saved = client.save_weights_for_sampler("later").result(30)
    train(client, 2)
    trained = greedy(second)
    assert greedy(first) == base
    assert trained != base
    third = client.save_weights_and_get_sampling_client()
    changed = greedy(third)
    assert changed != trained
    client.load_state(f"gradwire://{client.run_id}/state/start").result(30)
    assert greedy(third) == changed
    assert greedy(second) == trained
    assert greedy(client.save_weights_and_get_sampling_client()) == base
    assert greedy(service.create_sampling_client(saved.path)) == trained
    assert greedy(service.create_sampling_client()) == base


def test_a_checkpoint_saved_anew_under_its_name_is_sampled_as_it_is_now(service: ServiceClient, client: TrainingClient):
    path = client.save_weights_for_sampler("again").result(30).path
    before = greedy(service.create_sampling_client(path))
    train(client)
    client.save_weights_for_sampler("again", overwrite=True).result(30)
    assert greedy(service.create_sampling_client(path)) != before


def test_tokens_stream_as_they_come_and_are_those_of_sample(base: SamplingClient):
    params = SamplingParams(max_tokens=20, seed=3, stop=[])
    whole = base.sample(PROMPT, 2, params).result(30)
    streamed = list(base.stream(PROMPT, 2, params))
    for number, sequence in enumerate(whole.sequences):
        own = [token for token in streamed if token.sample == number]
        assert [token.token for token in own] == sequence.tokens
        assert [token.logprob for token in own] == sequence.logprobs
        assert [token.stop_reason for token in own] == [None] * 19 + ["length"]


def test_a_text_or_a_token_ends_a_sample(base: SamplingClient):
    free = base.sample(PROMPT, 1, SamplingParams(max_tokens=40, seed=9, stop=[])).result(30).sequences[0]
    assert free.stop_reason == "length"
    place = next(place for place, token in enumerate(free.tokens) if 33 <= token < 127 and place > 3)
    stop = chr(free.tokens[place])
    wanted = free.tokens[: free.tokens.index(free.tokens[place]) + 1]
    for stops in (stop, [stop], [free.tokens[place]]):
        params = SamplingParams(max_tokens=40, seed=9, stop=stops)
        sequence = base.sample(PROMPT, 1, params).result(30).sequences[0]
        assert (sequence.tokens, sequence.stop_reason) == (wanted, "stop")
    if 1 in free.tokens:
        sequence = base.sample(PROMPT, 1, SamplingParams(max_tokens=40, seed=9)).result(30).sequences[0]
        assert sequence.tokens[-1] == 1


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", ([], 1)),
        ("prompt", ([1] * 65, 1)),
        ("prompt", ([1] * 64, 1)),
        ("prompt.tokens[1]", ([1, 128], 1)),
        ("prompt", (["a"], 1)),
        ("num_samples", ([1], 0)),
        ("num_samples", ([1], 129)),
        ("topk_prompt_logprobs", ([1], 1, None, False, 129)),
        ("sampling_params.max_tokens", ([1], 1, SamplingParams(max_tokens=-1))),
        ("sampling_params.temperature", ([1], 1, SamplingParams(temperature=-0.1))),
        ("sampling_params.temperature", ([1], 1, SamplingParams(temperature=float("nan")))),
        ("sampling_params.top_k", ([1], 1, SamplingParams(top_k=-2))),
        ("sampling_params.top_p", ([1], 1, SamplingParams(top_p=0.0))),
        ("sampling_params.top_p", ([1], 1, SamplingParams(top_p=1.1))),
        ("sampling_params.stop.token_ids[0]", ([1], 1, SamplingParams(stop=[128]))),
        ("sampling_params.stop", ([1], 1, SamplingParams(stop=""))),
    ],
)
def test_what_cannot_be_sampled_is_refused_naming_the_field(base: SamplingClient, field: str, arguments: tuple):
    with pytest.raises(InvalidArgumentError) as refused:
        base.sample(*arguments).result(30)
    assert refused.value.field_violations[0][0] == field


def test_what_the_context_has_no_room_for_is_not_generated(base: SamplingClient):
    response = base.sample([1] * 60, 2, SamplingParams(max_tokens=1000, stop=[])).result(30)
    assert [(len(one.tokens), one.stop_reason) for one in response.sequences] == [(4, "length")] * 2


def test_frozen_weights_held_open_make_no_room_and_a_fifth_is_refused_until_one_is_closed(client: TrainingClient):
    clients = [client.save_weights_and_get_sampling_client() for _ in range(4)]
    with pytest.raises(ResourceExhaustedError, match="4 sets of frozen weights that clients hold open") as refused:
        client.save_weights_and_get_sampling_client().result(30)
    assert refused.value.reason == "LIMIT_EXCEEDED"
    assert len({tuple(greedy(each)) for each in clients}) == 1
    clients.pop().close()
    deadline = time.monotonic() + 20
    # Closing does not wait.
    while True:
        try:
            clients.append(client.save_weights_and_get_sampling_client().result(30))
            break
        except ResourceExhaustedError:
            assert time.monotonic() < deadline
    assert greedy(clients[3]) == greedy(clients[0])


def test_a_closed_client_and_a_deleted_run_let_frozen_weights_go(service: ServiceClient, client: TrainingClient):
    sampler = client.save_weights_and_get_sampling_client()
    path = sampler.model_path
    other = service.create_sampling_client(path)
    sampler.close()
    with pytest.raises(OperationCancelledError, match="closed"):
        sampler.sample(PROMPT)
    deadline = time.monotonic() + 20
    # Closing does not wait.
    while (failure := other.sample(PROMPT, 1, GREEDY).exception(30)) is None and time.monotonic() < deadline:
        pass
    assert isinstance(failure, NotFoundError)
    assert "it was closed" in str(failure)
    run = service.create_training_client()
    orphan = run.save_weights_and_get_sampling_client().result(30)
    run.delete_run()
    with pytest.raises(NotFoundError):
        greedy(orphan)


def test_a_long_generation_lets_training_through_and_comes_to_its_end(base: SamplingClient, client: TrainingClient):
    params = SamplingParams(max_tokens=59, stop=[])
    long = [base.sample(PROMPT, 32, params) for _ in range(8)]
    train(client, 3)
    assert client.optim_step().exception(30) is not None
    for future in long:
        assert all(len(sequence.tokens) == 59 for sequence in future.result(60).sequences)


def test_a_stream_that_is_left_and_a_future_that_is_cancelled_free_their_places(
    trainer: TrainerProcess, base: SamplingClient
):
    params = SamplingParams(max_tokens=59, stop=[])
    for _ in itertools.islice(base.stream(PROMPT, 128, params), 3):
        pass
    futures = [base.sample(PROMPT, 128, params) for _ in range(20)]
    assert futures[-1].cancel()
    for future in futures[:-1]:
        future.cancel()
    with pytest.raises(OperationCancelledError):
        futures[0].result(30)
    assert len(greedy(base)) == 6


def test_a_prompt_typed_as_text_is_answered_with_text(
    service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GRADWIRE_HOME", str(tmp_path))
    service.create_sampling_client()
    connection = service._connection
    request = SampleRequest(sampler=Sampler(), prompt_text="Hello")
    request.sampling_params.max_tokens = 8
    request.sampling_params.seed = 5
    request.sampling_params.stop.SetInParent()

    async def call() -> tuple[list[int], str]:
        stub = SamplingServiceStub(connection.channel())
        tokens, text = [], ""
        async for response in stub.Sample(request, metadata=connection.metadata):
            for piece in response.samples:
                tokens += piece.tokens
                text += piece.text
        return tokens, text

    tokens, text = LOOP.run(call(), 30)
    client = service.create_sampling_client()
    tokenizer = client.get_tokenizer()
    params = SamplingParams(max_tokens=8, seed=5, stop=[])
    assert client.sample(tokenizer("Hello")["input_ids"], 1, params).result(30).sequences[0].tokens == tokens
    assert text == tokenizer.decode(tokens)


def test_the_readmes_grpcurl_samples_from_a_prompt_typed_by_hand(trainer: TrainerProcess):
    section = (ROOT / "docs" / "grpcurl.md").read_text().split("<!-- run by tests/e2e/test_sampling.py -->")[1]
    block = section.split("```bash\n")[1].split("```")[0]
    *sampled, logprobs = documents(bash(block, trainer.address))
    pieces = [piece for response in sampled for piece in response["samples"]]
    assert "".join(piece.get("text", "") for piece in pieces)
    assert pieces[-1]["stop_reason"] in ("STOP_REASON_LENGTH", "STOP_REASON_STOP")
    assert len(logprobs["prompt"]["logprobs"]) == 2
