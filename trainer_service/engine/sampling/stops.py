"""Finds stop strings in text that comes in pieces, in about a step a character however many strings there are.

Aho and Corasick 1975, https://doi.org/10.1145/360825.360855. Written here because the C library for it, pyahocorasick
2.3.1, aborts the process when a search goes on over several pieces of text.
"""

from collections.abc import Iterable

START = 0
"""The state before any text."""
_NUM_CHARACTERS = 0x110000


class StopStrings:
    """An automaton whose states are the beginnings of the strings.

    Args:
        strings: None of them empty.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: dict[int, int] = {}
        """By state and character: the state one character further into a string. One flat table of integers, since
        every request under way may have thousands of states."""
        self._complete = bytearray([0])
        """By state: whether a string ends there."""
        edges: list[list[tuple[int, str, int]]] = []
        for string in strings:
            self._complete[self._add(string, edges)] = 1
        self._fall_back = [START] * len(self._complete)
        """By state: that of the longest proper ending that also begins a string."""
        # Shorter beginnings first: what a state falls back to is shorter than it is.
        for state, character, following in (edge for of_depth in edges for edge in of_depth):
            if state != START:
                self._fall_back[following] = self._step(self._fall_back[state], character)
            self._complete[following] |= self._complete[self._fall_back[following]]

    def feed(self, state: int, text: str) -> int | None:
        """The state behind `text`, from the one before it; None where a string is complete within it."""
        for character in text:
            state = self._step(state, character)
            if self._complete[state]:
                return None
        return state

    def _step(self, state: int, character: str) -> int:
        while (following := self._next.get(state * _NUM_CHARACTERS + ord(character))) is None:
            if state == START:
                return START
            state = self._fall_back[state]
        return following

    def _add(self, string: str, edges: list[list[tuple[int, str, int]]]) -> int:
        """The state at the end of a string; new steps go to `edges`, by how far into the string they are."""
        state = START
        for depth, character in enumerate(string):
            following = self._next.setdefault(state * _NUM_CHARACTERS + ord(character), len(self._complete))
            if following == len(self._complete):
                self._complete.append(0)
                if depth == len(edges):
                    edges.append([])
                edges[depth].append((state, character, following))
            state = following
        return state
