"""Versions of the software and of the protocol it speaks."""

__version__ = "0.1.0"

PROTOCOL_VERSION = 1
"""Rises when an old peer would misunderstand; both sides refuse a version they cannot speak."""
