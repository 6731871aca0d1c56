"""What is raised of a checkpoint that must not be loaded. No torch: the launcher knows it too."""

from __future__ import annotations


class Damaged(ValueError):
    """A checkpoint is not what was written, or is none; the message, one line, names the file."""
