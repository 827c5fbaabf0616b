"""Rows about whole steps: what the service, a closure, and many small datums add to one."""

import statistics
import time

from gradwire import Datum, TrainingClient
from service import InProcess, Step, built_in, custom, make_data, trainer, two_pass, vocab_size
from service import tiny_model as make_tiny_model
from side_by_side import Row, Setting, interleave, ms, ratio


def custom_over_built_in(setting: Setting) -> list[Row]:
    """A closure costs one forward, not two."""
    return [_custom_row(setting, "off", ""), _custom_row(setting, "on", ", activation checkpointing on")]


def _custom_row(setting: Setting, checkpointing: str, what: str) -> Row:
    with trainer(setting, f"custom-{checkpointing}", "--activation-checkpointing", checkpointing) as service:
        clients = [service.create_training_client() for _ in range(1 if setting.quick else 2)]
        tokens = setting.pick(400, 40)
        data = make_data(vocab_size(service), [tokens // 4] * 4)
        times = interleave(
            {
                "built-in": lambda: built_in(clients[0], data),
                "custom": lambda: custom(clients[-1], data),
                "two passes": lambda: two_pass(clients[0], data),
            },
            rounds=setting.rounds,
        )
    two = ratio(times["two passes"], times["built-in"])
    return Row(
        f"custom loss over built-in, whole step through the service, {tokens} tokens{what}",
        f"{ms(times['custom'])} / {ms(times['built-in'])}; in two passes {two:.2f}",
        f"{ratio(times['custom'], times['built-in']):.3f}",
        "at most 1.02",
    )


def service_over_in_process(setting: Setting) -> list[Row]:
    """What the journal, two hops and the wire add."""
    rows: list[Row] = []
    tokens = setting.pick(400, 40)
    with trainer(setting, "service") as service:
        client, engine = service.create_training_client(), InProcess(setting.model, setting.folder)
        data = make_data(vocab_size(service), [tokens // 4] * 4)
        sides = {"service": lambda: built_in(client, data), "in process": lambda: engine.step(data)}
        times = interleave(sides, rounds=setting.rounds)
    rows.append(
        Row(
            f"step through the service over in process, {tokens} tokens",
            f"{ms(times['service'])} / {ms(times['in process'])}",
            f"{ratio(times['service'], times['in process']):.3f}",
            "at most 1.005",
        )
    )
    model = setting.model if setting.quick else make_tiny_model(setting.folder)
    with trainer(setting, "fixed", model=model) as service:
        client, engine = service.create_training_client(), InProcess(model, setting.folder)
        data = make_data(vocab_size(service), [16])
        times = interleave(
            {
                "in process": lambda: engine.step(data),
                "built-in": lambda: built_in(client, data),
                "custom": lambda: custom(client, data),
                "zero_grad": lambda: client.zero_grad().result(60),
            },
            rounds=setting.pick(300, 3),
            warmup=setting.pick(20, 1),
        )
        for name, goal in (("built-in", "2 ms"), ("custom", "4 ms")):
            fixed = statistics.median(a - b for a, b in zip(times[name], times["in process"], strict=True))
            rows.append(
                Row(
                    f"fixed cost of a step through the service, tiny model, {name} loss",
                    f"{ms(times[name])} - {ms(times['in process'])}",
                    f"{fixed * 1000:.2f} ms",
                    f"at most {goal}",
                )
            )
        rows.append(Row("round trip of zero_grad", ms(times["zero_grad"])))
        rows.append(_slope(setting, client, vocab_size(service)))
    return rows


def _slope(setting: Setting, client: TrainingClient, vocab: int) -> Row:
    """What a token adds beside the time on the device, which the answers tell."""
    few, many = setting.pick(256, 16), setting.pick(65536, 64)
    beside: dict[int, list[float]] = {}
    for tokens in (few, many):
        data = make_data(vocab, [min(tokens, 256)] * max(1, tokens // 256))
        beside[tokens] = [_beside_device(client, data) for _ in range(setting.pick(15, 2))][1:]
    slope = (statistics.median(beside[many]) - statistics.median(beside[few])) / (many - few)
    return Row(
        f"the same, slope per token from {few} to {many}",
        f"{ms(beside[few])} to {ms(beside[many])}",
        f"{slope * 1e6:.3f} µs",
        "at most 0.03 µs",
    )


def _beside_device(client: TrainingClient, data: list[Datum]) -> float:
    start = time.perf_counter()
    output = client.forward_backward(data, "cross_entropy").result(600)
    took_s = time.perf_counter() - start - output.timing.execute_ms / 1000
    client.zero_grad().result(60)
    return took_s


def growing_datums(setting: Setting) -> list[Row]:
    """The same tokens in more and more datums."""
    tokens = setting.pick(1000, 40)
    rows: list[Row] = []
    with trainer(setting, "datums") as service:
        client = service.create_training_client()
        vocab = vocab_size(service)
        many = {count: make_data(vocab, [tokens // count] * count) for count in (1, tokens // 10, tokens)}
        step: Step = built_in
        times = interleave(
            {str(count): lambda data=data: step(client, data) for count, data in many.items()},
            rounds=max(2, setting.rounds // 2),
        )
        most = str(tokens)
        rows.append(
            Row(
                f"step of {tokens} tokens in 1,000 datums over one in 1",
                " / ".join(f"{ms(times[str(count)])} ({count})" for count in reversed(many)),
                f"{ratio(times[most], times['1']):.3f}",
                "at most 1.1",
            )
        )
    return rows
