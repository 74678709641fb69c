"""The version of pessa."""

from __future__ import annotations

VERSION = "0.4.0"
