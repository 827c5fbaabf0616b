"""Sampling from models in parts: rank 0 samples, and the others run along so that layers are gathered.

Where there is no room for a whole model on each rank, a sampler's model lies in parts, and each of its forwards gathers
a layer, uses it and lets it go. All ranks must take part in that. So all requests are rank 0's, in one schedule, and
before each forward it tells the others whose model it is; they run that model too, on one token that nobody asked
about. Nothing else of sampling happens there, so nothing can come out otherwise on another rank.
"""

from collections.abc import Callable, Iterable

from trainer_service.engine.parallel.sharding import free_cycles, record_of, reshard
from trainer_service.engine.rank_channels import Channel
from trainer_service.engine.sampling.decoder import Decoder

_NO_MORE = -1


class InParts:
    """The models in parts that are sampled from, under the same numbers on every rank.

    Args:
        channel: To the other ranks.
        in_use: Rank 0's decoders that anything can still be sampled with.
    """

    def __init__(self, channel: Channel, in_use: Callable[[], Iterable[Decoder]]) -> None:
        self._channel = channel
        self._in_use = in_use
        self._decoders: dict[int, Decoder] = {}
        self._last_number = 0
        self.within_forward = False
        """Whether rank 0 has begun a forward that has not ended: where it raised, the others wait in the middle."""

    def take_in(self, decoder: Decoder) -> None:
        """Has forwards of a model in parts be every rank's; those of a whole one are not. Every rank must call this."""
        if record_of(decoder.model) is None:
            return
        self._prune()
        number = self._last_number = self._last_number + 1
        self._decoders[number] = decoder
        if self._channel.leads:
            # Before FSDP's own, which gathers.
            decoder.model.register_forward_pre_hook(lambda *_: self._begin(number), prepend=True)
            decoder.model.register_forward_hook(lambda *_: self._end())

    def lead(self, work: Callable[[], object]) -> None:
        """Rank 0's slice of sampling."""
        self._prune()
        work()
        self._channel.tell(_NO_MORE)
        self._let_go()

    def follow(self) -> None:
        """The same on the others."""
        self._prune()
        while (number := self._channel.tell()) != _NO_MORE:
            self._decoders[number].forwards.own_logits([0])
        self._let_go()

    def _begin(self, number: int) -> None:
        self.within_forward = True
        self._channel.tell(number)

    def _end(self) -> None:
        self.within_forward = False

    def _let_go(self) -> None:
        """Of the embedding and the head, which stay gathered from one forward to the next."""
        for decoder in self._decoders.values():
            reshard(decoder.model)

    def _prune(self) -> None:
        """Lets go of models that nothing is sampled with any more, which rank 0 alone knows: it has the requests."""
        used = {id(decoder) for decoder in self._in_use()}
        kept = self._channel.tell([number for number, decoder in self._decoders.items() if id(decoder) in used])
        gone = self._decoders.keys() - {*kept}
        for number in gone:
            del self._decoders[number]
        if gone:
            free_cycles()
