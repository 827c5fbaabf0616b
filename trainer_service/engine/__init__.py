"""Everything that touches torch. Nothing outside this room imports it."""
