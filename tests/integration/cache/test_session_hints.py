"""Session hints through SGLang's own request objects: where they are checked and how they arrive."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from elora_sglang.core.hints import Hints
from elora_sglang.integration.adapters.tokenizer import EloraTokenizerManager
from elora_sglang.integration.cache import session_hints
from elora_sglang.runtime.adapters.names import NameFault

GIVEN = {"session_id": "chat-7", "expect_return_s": 4, "thinking_budget": 9}
HINTS = Hints("chat-7", False, 4.0)


@pytest.fixture
def accept() -> Callable[[GenerateReqInput], None]:
    """What ``generate_request`` does with a request first: SGLang normalizes it, the subclass checks it."""
    manager = EloraTokenizerManager.__new__(EloraTokenizerManager)
    manager.rid_to_state = {}
    manager.enable_trace = False
    manager.disaggregation_mode = None

    def take(request: GenerateReqInput) -> None:
        request.normalize_batch_and_arguments()
        manager._init_req_state(request)

    return take


def arrived(params: Any, **fields: Any) -> Req:
    """The scheduler's request, its sampling parameters sent the way SGLang sends them."""
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams(**params)), type=SamplingParams)
    return Req("r", "", [1, 2], sent, vocab_size=9, **fields)


@pytest.mark.parametrize("batch", [False, True])
def test_malformed_hints_are_the_clients_error(accept: Callable[..., None], batch: bool) -> None:
    bad: Any = {"custom_params": {"session_end": "yes"}}
    request = GenerateReqInput(text=["a", "b"], sampling_params=[{}, bad])
    if not batch:
        request = GenerateReqInput(text="a", sampling_params=bad)
    with pytest.raises(ValueError, match=r"^session_end must be true or false, got 'yes'$"):
        accept(request)
    with pytest.raises(ValueError, match=r"^custom_params must be an object, got list$"):
        accept(GenerateReqInput(text="a", sampling_params={"custom_params": [1]}))


def test_a_request_is_checked_for_hints_and_names(accept: Callable[..., None]) -> None:
    accept(GenerateReqInput(text="a", sampling_params={"custom_params": GIVEN}))
    accept(GenerateReqInput(text="a"))
    with pytest.raises(NameFault):
        accept(GenerateReqInput(text="a", lora_path=["x", "y"]))


def test_hints_arrive_at_the_scheduler() -> None:
    req = arrived({"custom_params": GIVEN})
    assert session_hints.of(req) == HINTS and session_hints.of(req) is session_hints.of(req)
    assert req.sampling_params.custom_params == GIVEN  # others still find theirs
    assert session_hints.of(arrived({})) == Hints()


def test_sglangs_own_session_id_counts_and_the_custom_one_goes_before() -> None:
    assert session_hints.of(arrived({}, session_id="own")) == Hints("own")
    assert session_hints.of(arrived({"custom_params": {"session_end": True}}, session_id="own")) == Hints(
        "own", True
    )
    assert session_hints.of(arrived({"custom_params": GIVEN}, session_id="own")) == HINTS


def test_what_bypassed_the_check_says_nothing() -> None:
    for params in ({"session_end": 3}, ["no object"], 5):
        assert (
            session_hints.of(SimpleNamespace(sampling_params=SimpleNamespace(custom_params=params)))
            == Hints()
        )
    assert session_hints.of(SimpleNamespace(sampling_params=None)) == Hints()


def test_the_openai_api_passes_them_on() -> None:
    chat = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "a"}], custom_params=GIVEN, session_id="own"
    )
    params = chat.to_sampling_params([], {}, None)
    assert params["custom_params"] == GIVEN and chat.session_id == "own"
    assert CompletionRequest(model="m", prompt="a", custom_params=GIVEN).custom_params == GIVEN
