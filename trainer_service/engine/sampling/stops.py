"""Finds stop strings in text that comes in pieces, in one step a character however many strings there are.

Aho and Corasick 1975, https://doi.org/10.1145/360825.360855. Written here because the C library for it, pyahocorasick
2.3.1, aborts the process when a search goes on over several pieces of text.
"""

from collections import deque
from collections.abc import Iterable

START = 0
"""The state before any text."""


class StopStrings:
    """An automaton whose states are the beginnings of the strings.

    Args:
        strings: None of them empty.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        """By state: the character that leads one further into a string, and the state there."""
        self._complete = [False]
        """By state: whether a string ends here."""
        for string in strings:
            self._complete[self._add(string)] = True
        self._fall_back = self._link()
        """By state: that of the longest proper ending that also begins a string."""

    def feed(self, state: int, text: str) -> int | None:
        """The state behind `text`, from the one before it; None where a string is complete within it."""
        for character in text:
            state = self._step(state, character)
            if self._complete[state]:
                return None
        return state

    def _step(self, state: int, character: str) -> int:
        while (found := self._next[state].get(character)) is None:
            if state == START:
                return START
            state = self._fall_back[state]
        return found

    def _add(self, string: str) -> int:
        """The state at the end of a string."""
        state = START
        for character in string:
            following = self._next[state].setdefault(character, len(self._next))
            if following == len(self._next):
                self._next.append({})
                self._complete.append(False)
            state = following
        return state

    def _link(self) -> list[int]:
        self._fall_back = [START] * len(self._next)
        states = deque(self._next[START].values())
        # Shorter beginnings first: what a state falls back to is shorter than it is.
        while states:
            state = states.popleft()
            for character, following in self._next[state].items():
                self._fall_back[following] = self._step(self._fall_back[state], character)
                self._complete[following] |= self._complete[self._fall_back[following]]
                states.append(following)
        return self._fall_back
