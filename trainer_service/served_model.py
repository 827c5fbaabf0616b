"""How the base model is called: by its callers, and on this machine. Ground."""

import os
from dataclasses import dataclass

from gradwire.errors import error

from trainer_service.access import current_caller
from trainer_service.options import SettingsError

_MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class ServedModel:
    """The one base model of a trainer.

    Attributes:
        source: Hub id or folder it is loaded from.
        served_name: What callers are told it is called; "" tells them the source.
        aliases: Further names that callers may give it.
    """

    source: str
    served_name: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.served_name, *self.aliases):
            if len(name) > _MAX_NAME_LENGTH or not name.isprintable() or name != name.strip():
                raise SettingsError(
                    f"The model name {name[:_MAX_NAME_LENGTH]!r} has spaces around it, characters that do not print, "
                    f"or more than {_MAX_NAME_LENGTH}; --served-model-name and --alias take one such as org/model."
                )
        if "" in self.aliases:
            raise SettingsError("--alias is empty; give a name such as org/model, or leave it out.")

    @property
    def name(self) -> str:
        """What callers are told."""
        return self.served_name or self.source

    def check(self, base_model: str) -> None:
        """Refuses a name of another model, for the current caller; "" is whatever is served. Where there is a served
        name, the source is none for who is no admin.

        Raises:
            FailedPreconditionError: BASE_MODEL_MISMATCH.
        """
        if base_model in ("", self.served_name, *self.aliases):
            return
        if (not self.served_name or current_caller.get().admin) and self.is_source(base_model):
            return
        also = f" (or {', '.join(map(repr, self.aliases))})" if self.aliases else ""
        raise error(
            "BASE_MODEL_MISMATCH",
            f"base_model is {base_model!r}, but this trainer serves {self.name!r}{also}; ask for that one, or start a "
            "trainer for yours.",
            requested=base_model,
            served=self.name,
        )

    def is_source(self, name: str) -> bool:
        """Whether a name is what it is loaded from: equal, or a folder that is the same folder."""
        if name == self.source:
            return True
        # os.path, since pathlib raises on names that cannot be paths, such as very long ones.
        return os.path.isdir(name) and os.path.isdir(self.source) and os.path.samefile(name, self.source)

    def told(self, name: str) -> str:
        """What callers are told of a model that was written down under a name."""
        return self.name if self.is_source(name) else name

    def without_source(self, text: str) -> str:
        """A text for the current caller: of the folder on this machine who is no admin is told the name alone."""
        if not self.served_name or current_caller.get().admin:
            return text
        sources = {self.source, os.path.abspath(os.path.expanduser(self.source)), os.path.realpath(self.source)}
        for source in sorted(sources, key=len, reverse=True):
            text = text.replace(source, self.served_name)
        return text
