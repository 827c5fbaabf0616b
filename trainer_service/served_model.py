"""Names of the base model: for callers, and on this machine. Ground floor."""

import os
from dataclasses import dataclass

from gradwire.errors import error

from trainer_service.access import current_caller
from trainer_service.command_lines import SettingsError

_MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class ServedModel:
    """The one base model of a trainer.

    Attributes:
        source: Hub id or folder it is loaded from.
        served_name: Name that callers see; "" shows them the source.
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
        """The name that callers see."""
        return self.served_name or self.source

    def check(self, base_model: str) -> None:
        """Refuses a name of another model, for the current caller; "" names whatever is served. With a served name, the
        source is a name for admins only.

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
        """Whether a name is the source: the same text, or the same folder."""
        if name == self.source:
            return True
        # os.path, since pathlib raises on names that cannot be paths, such as very long ones.
        return os.path.isdir(name) and os.path.isdir(self.source) and os.path.samefile(name, self.source)

    def told(self, name: str) -> str:
        """The name that callers see of a model recorded under a name."""
        return self.name if self.is_source(name) else name

    def without_source(self, text: str) -> str:
        """A text for the current caller: for all but admins, the name replaces the folder on this machine."""
        if not self.served_name or current_caller.get().admin:
            return text
        sources = {self.source, os.path.abspath(os.path.expanduser(self.source)), os.path.realpath(self.source)}
        for source in sorted(sources, key=len, reverse=True):
            text = text.replace(source, self.served_name)
        return text
