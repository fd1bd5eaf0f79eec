"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# A busy machine takes its time; what a test asserts is behaviour, never speed.
settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")
