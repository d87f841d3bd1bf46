"""Session hints: from a request's custom parameters to the scheduler.

SGLang carries ``sampling_params.custom_params`` unchanged from every API to the scheduler's ``Req`` (the OpenAI
API takes them as ``custom_params`` in the body) and reads them only for a custom logit processor. Its own
top-level ``session_id``, which alone changes nothing in SGLang, counts as the session id, too.

They are checked where a request enters, so that a malformed hint is the client's error and not a lost hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from elora_sglang.core.hints import Hints, parse_hints

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

_ATTRIBUTE = "_elora_hints"

_NOTHING = Hints()


def check_request(request: GenerateReqInput) -> None:
    """Refuse malformed hints in a request that SGLang has normalized. Changes nothing.

    Raises:
        ValueError: one line, which SGLang's APIs answer with status 400.
    """
    rows = request.sampling_params
    for row in rows if isinstance(rows, list) else [rows]:
        given = row.get("custom_params") if isinstance(row, Mapping) else None
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"custom_params must be an object, got {type(given).__name__}")
        parse_hints(given)


def of(req: Req) -> Hints:
    """The request's hints, parsed once. Never raises: one that bypassed the check and is malformed says nothing."""
    found = getattr(req, _ATTRIBUTE, None)
    if found is None:
        found = _parse(req)
        setattr(req, _ATTRIBUTE, found)
    return found


def _parse(req: Any) -> Hints:
    given = getattr(req.sampling_params, "custom_params", None)
    try:
        hints = parse_hints(given) if isinstance(given, Mapping) else _NOTHING
        if hints.session is None and getattr(req, "session_id", None) is not None:
            own = parse_hints({"session_id": req.session_id})
            hints = Hints(own.session, hints.session_end, hints.expect_return_s)
    except ValueError:
        return _NOTHING
    return hints
