"""One Sample request on its way: what its samples have so far, and what of it the client has not been sent."""

import itertools
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from gradwire.errors import GradwireError, error
from gradwire.v1 import sampling_service_pb2 as pb

from trainer_service.engine.sampling import picking
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.sequences import Sequences, num_cached_tokens
from trainer_service.engine.sampling.text import Transcript


@dataclass
class Sample:
    """One sample of a request."""

    number: int
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk_tokens: list[list[int]] = field(default_factory=list)
    """Likeliest tokens at the place of each, where they are asked for."""
    topk_logprobs: list[list[float]] = field(default_factory=list)
    stop_reason: pb.StopReason = pb.STOP_REASON_UNSPECIFIED
    transcript: Transcript | None = None
    num_sent: int = 0
    ended: bool = False
    """Whether its last tokens were sent."""


class Job:
    """A request under way.

    Args:
        command_id: The command to answer.
        sample_id: Names it to cancel_sample.
        request: What to generate.
        sampler: Whose parameters.
        owner: Who asked.
    """

    def __init__(self, command_id: int, sample_id: str, request: Request, sampler: Sampler, owner: str = "") -> None:
        self.command_id = command_id
        self.sample_id = sample_id
        self.request = request
        self.sampler = sampler
        self.owner = owner
        self.sequences = Sequences(request.num_samples)
        self.num_prefilled = 0
        """Tokens of the prompt taken in."""
        self.samples = [
            Sample(number, picking.generator(request.seed, number)) for number in range(request.num_samples)
        ]
        if request.text is not None:
            for sample in self.samples:
                sample.transcript = Transcript(
                    request.text, request.prompt, request.stop_strings, keep=request.with_text
                )
        self.alive = list(self.samples)
        """Those that have not ended."""
        self.held = self.alive
        """Those the decoder knows, in its order; while tokens are computed again, ended ones among them."""
        self.num_fed = 0
        """Tokens of each sample that the decoder has been through."""
        self.prompt_known = False
        """Whether what was asked about the prompt was found out."""
        self.times_put_back = 0
        self.waiting_since_s = time.monotonic()
        self.prompt = self._nothing_known()
        self.done = False
        """Whether it was answered to its end."""
        self._prompt_sent = not request.wants_prompt
        self._last_sent_s = 0.0

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt was taken in."""
        return self.num_prefilled == len(self.request.prompt)

    @property
    def wants_prompt(self) -> bool:
        """Whether anything about the prompt is still to be found out."""
        return self.request.wants_prompt and not self.prompt_known

    @property
    def num_generated(self) -> int:
        """Tokens of each sample alive."""
        return len(self.alive[0].tokens) if self.alive else 0

    def cache_bytes(self, *, in_the_end: bool) -> int:
        """What its caches take with the next token, or take at most in the end."""
        shape, request = self.sampler.decoder.shape, self.request
        if shape is None:
            return 0
        num_generated = request.max_tokens if in_the_end else min(request.max_tokens, self.num_generated + 1)
        num_tokens = num_cached_tokens(
            request.num_samples,
            len(request.prompt),
            num_generated,
            num_alive=len(self.held),
            may_share=self.sampler.decoder.shares_prompts,
        )
        # What is remembered of the prompt stays until its samples have gone their own ways.
        num_states = len(self.held) + (not self.num_fed)
        return num_tokens * shape.bytes_per_token + num_states * shape.state_bytes

    def put_back(self) -> None:
        """Lets go of its caches. They are computed again as they were: what was generated is not chosen anew."""
        self.sequences.close()
        self.sequences = Sequences(self.request.num_samples)
        if not self.prompt_known:
            self.prompt = self._nothing_known()
        self.num_prefilled = self.num_fed = 0
        self.held = list(self.samples)
        self.times_put_back += 1
        self.waiting_since_s = time.monotonic()

    @property
    def repeats(self) -> bool:
        """Whether the tokens behind those the decoder has been through were chosen before."""
        return self.num_generated > self.num_fed

    def repeat(self) -> list[int]:
        """Those of the samples held that went on behind the token they then chose, by their place."""
        going_on = [
            place
            for place, sample in enumerate(self.held)
            if not sample.stop_reason or len(sample.tokens) > self.num_fed + 1
        ]
        self.held = [self.held[place] for place in going_on]
        return going_on

    def feed(self) -> list[int]:
        """The tokens the decoder goes through next, one of each sample held."""
        self.num_fed += 1
        return [sample.tokens[self.num_fed - 1] for sample in self.held]

    def num_logits(self, num_tokens: int) -> int:
        """Behind how many of the next tokens of the prompt logits are wanted: those that anything is asked for about,
        and the last."""
        if not self.wants_prompt:
            return 1
        return max(1, min(num_tokens, self.num_prefilled + num_tokens - self.request.rows_from()))

    def add_prompt(self, logits_NV: picking.Tensor) -> None:
        """Takes in the logits behind the last tokens of the prompt taken in."""
        request = self.request
        first = self.num_prefilled - len(logits_NV)
        count = min(len(logits_NV), len(request.prompt) - 1 - first)
        start = max(0, request.first_row - first)
        if (request.prompt_logprobs or request.topk) and start < count:
            tokens = request.prompt[first + start + 1 : first + count + 1]
            found = picking.place_logprobs(logits_NV[start:count], tokens, request.topk)
            if request.prompt_logprobs:
                self.prompt.logprobs.extend(found.logprobs)
            self.prompt.topk_tokens.extend(found.topk_tokens)
            self.prompt.topk_logprobs.extend(found.topk_logprobs)
        start = max(0, request.first_target_row - first)
        if request.targets is not None and start < count:
            rows = request.targets[first + start : first + count]
            targets_NK = torch.tensor(rows, device=logits_NV.device)
            self.prompt.target_logprobs.extend(picking.target_logprobs(logits_NV[start:count], targets_NK))

    def _nothing_known(self) -> pb.PromptLogprobs:
        """Of the prompt, but that nothing is asked for about its first rows."""
        request = self.request
        unasked = 0 if request.targets is None else request.first_target_row * request.targets.shape[1]
        return pb.PromptLogprobs(topk=request.topk, target_logprobs=[0.0] * unasked)

    def take_likeliest(self, logits_NV: picking.Tensor) -> None:
        """Notes the likeliest tokens at the next place of every sample alive, before a token is taken there."""
        found = picking.likeliest(logits_NV, self.request.topk_sampled)
        for sample, tokens, logprobs in zip(self.alive, *found, strict=True):
            sample.topk_tokens.append(tokens)
            sample.topk_logprobs.append(logprobs)

    def take(self, tokens: list[int], logprobs: list[float]) -> list[int]:
        """One more token of every sample alive.

        Returns:
            Which of them go on, by their place among those alive before.

        Raises:
            FailedPreconditionError: NON_FINITE: the parameters give no probabilities.
        """
        request = self.request
        for sample, token, logprob in zip(self.alive, tokens, logprobs, strict=True):
            if not math.isfinite(logprob):
                raise error(
                    "NON_FINITE",
                    f"The model gave no finite probabilities behind {len(request.prompt) + len(sample.tokens)} tokens: "
                    "its parameters are NaN or infinite. Sample from an earlier checkpoint, and look at the losses and "
                    "the learning rate of the last steps.",
                )
            sample.tokens.append(token)
            sample.logprobs.append(logprob)
            stopped = sample.transcript is not None and sample.transcript.add(token)
            if stopped or token in request.stop_tokens:
                sample.stop_reason = pb.STOP_REASON_STOP
            elif len(sample.tokens) == request.max_tokens:
                sample.stop_reason = pb.STOP_REASON_LENGTH
        going_on = [place for place, sample in enumerate(self.alive) if not sample.stop_reason]
        self.alive = self.held = [self.alive[place] for place in going_on]
        return going_on

    def response(self, *, now_s: float | None = None) -> pb.SampleResponse | None:
        """What the client is to be sent now; None for nothing yet."""
        now_s = time.monotonic() if now_s is None else now_s
        if self.alive and now_s - self._last_sent_s < self.request.message_interval_s:
            return None
        self._last_sent_s = now_s
        response = pb.SampleResponse()
        if not self._prompt_sent:
            self._prompt_sent = True
            response.prompt.CopyFrom(self.prompt)
        for sample in self.samples:
            if sample.ended or sample.num_sent == len(sample.tokens):
                continue
            sample.ended = sample.stop_reason != pb.STOP_REASON_UNSPECIFIED
            response.samples.append(
                pb.SampledTokens(
                    sample=sample.number,
                    tokens=sample.tokens[sample.num_sent :],
                    logprobs=sample.logprobs[sample.num_sent :],
                    stop_reason=sample.stop_reason,
                    topk_tokens=itertools.chain.from_iterable(sample.topk_tokens[sample.num_sent :]),
                    topk_logprobs=itertools.chain.from_iterable(sample.topk_logprobs[sample.num_sent :]),
                    text=sample.transcript.take(last=sample.ended)
                    if sample.transcript is not None and self.request.with_text
                    else "",
                )
            )
            sample.num_sent = len(sample.tokens)
        return response if response.samples or response.HasField("prompt") else None


def cancelled() -> GradwireError:
    """Why a request that was given up ended."""
    return error("CANCELLED", "The request was given up by its client.")
