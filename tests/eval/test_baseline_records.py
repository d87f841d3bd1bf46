"""The records of a baseline server: what they touch is as it was read, and the product does not know them."""

from __future__ import annotations

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  SGLang's modules import each other; this order works

from elora_sglang.eval.baselines.patches import MANIFEST, PATCHES
from elora_sglang.integration.plugin import verify
from elora_sglang.patches.base import Patch, discover, manifest


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_target_is_as_it_was_read_and_the_hook_exists(patch: Patch) -> None:
    state = verify.check_target(patch, manifest(MANIFEST))
    assert state.ok and state.hash_ok, state.problem


def test_the_product_does_not_list_them() -> None:
    assert not {p.name for p in PATCHES} & {p.name for p in discover()}
