"""Versions of the software and of the protocol it speaks, and who understands whom."""

from gradwire.errors import error

__version__ = "0.1.0"

PROTOCOL_VERSION = 1
"""Rises when an old peer would misunderstand; both sides refuse a version they cannot speak."""
MIN_PROTOCOL_VERSION = 1
"""The oldest that a server of this version still understands."""


def check_client(version: str) -> None:
    """Refuses a client that this server does not understand.

    Args:
        version: As the client sent it.

    Raises:
        FailedPreconditionError: PROTOCOL_VERSION_UNSUPPORTED.
    """
    spoken = [str(known) for known in range(MIN_PROTOCOL_VERSION, PROTOCOL_VERSION + 1)]
    if version not in spoken:
        raise error(
            "PROTOCOL_VERSION_UNSUPPORTED",
            f"The client speaks protocol version {version}, but this server speaks {' or '.join(spoken)}. "
            "Install the same gradwire on both sides.",
            client=version,
            server=PROTOCOL_VERSION,
        )


def check_server(oldest: int, newest: int, whose: str) -> None:
    """Refuses a server that does not understand this client.

    Args:
        oldest: The oldest protocol version that it understands.
        newest: The newest.
        whose: The server, for the error's message.

    Raises:
        FailedPreconditionError: PROTOCOL_VERSION_UNSUPPORTED.
    """
    if not oldest <= PROTOCOL_VERSION <= newest:
        raise error(
            "PROTOCOL_VERSION_UNSUPPORTED",
            f"This SDK (gradwire {__version__}) speaks protocol version {PROTOCOL_VERSION}, but {whose} speaks "
            f"{oldest} to {newest}. Install the same gradwire on both sides.",
            client=PROTOCOL_VERSION,
            server=newest,
        )
