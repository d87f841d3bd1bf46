"""Tests below ``interpreted/`` need Triton's interpreter, which is chosen when Triton is imported."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
