"""SGLang's prefill pass and decode around the real ``EloraPrefillAdder`` and cache, without a model or a server.

Requests are stand-ins with what ``PrefillAdder`` reads of them. :meth:`World.iterate` is one scheduler iteration, as
``Scheduler.get_next_batch_to_run``: a prefill batch if anybody can be admitted, else a decode of all who run.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from support.cache_harness import Harness

from elora_sglang.core.overtaking import Overtaking
from elora_sglang.integration.scheduler.admission import EloraPrefillAdder, may_schedule


class Nobody(Overtaking):
    """First-come-first-served."""

    def may_pass(self, rid: str | None, *, chunks: int, tokens: int) -> bool:
        return False


class Anybody(Overtaking):
    """Whoever fits passes: the negative control."""

    def may_pass(self, rid: str | None, *, chunks: int, tokens: int) -> bool:
        return True


class World:
    """One server: a pool with adapters, a queue and a running batch; counts what a pass does.

    Attributes:
        calls: what the last pass asked for: requests looked at, matched, and questions to the rule.
        waits: batches that each admitted request waited.
    """

    def __init__(
        self,
        size: int,
        adapters: dict[str, int],
        *,
        rows: int = 16,
        host: int = 0,
        rule: Overtaking | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.harness = Harness(size, adapters, host=host, settings=settings)
        self.cache = self.harness.cache
        if rule is not None:
            self.cache.manager.admission.overtaking = rule
        self.rows = rows
        self.queue: list[Any] = []
        self.running = SimpleNamespace(reqs=[], batch_is_full=False)
        self.scheduler: Any = SimpleNamespace(tree_cache=self.cache, lora_drainer=None)
        self.waits: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._queued: dict[str, int] = {}
        self._start = 0

    @property
    def rule(self) -> Overtaking:
        return self.cache.manager.admission.overtaking

    def ask(
        self,
        lora_id: str | None,
        *,
        prompt: int = 8,
        max_new: int = 4,
        length: int | None = None,
        tokens: list[int] | None = None,
    ) -> Any:
        """A request arrives; it generates ``length`` tokens, by default all that it may."""
        self._start += prompt
        tokens = list(range(self._start, self._start + prompt)) if tokens is None else tokens
        req = self.harness.request(tokens, lora_id)
        req.sampling_params.max_new_tokens = max_new
        req.sampling_params.ignore_eos = False
        req.length = max_new if length is None else length
        req.cache_request_handle = CacheRequestHandle(req.rid, 0)
        for name in ("swa_host_hit_length", "auxiliary_swa_host_hit_length", "mamba_host_hit_length"):
            setattr(req, name, 0)
        req.storage_hit_length, req.storage_hit_start, req.host_hit_is_storage = 0, None, False
        req.needs_host_load_back = lambda: req.host_hit_length > 0
        req.materialized_host_hit_len = req.fulfilled_storage_hit_len = lambda *_: 0
        self.queue.append(req)
        self._queued[req.rid] = self.rule.batches
        self.cache.enqueued(req)
        return req

    def abort(self, req: Any) -> None:
        """A waiting request is aborted."""
        self.queue.remove(req)
        self.harness.abort(req)

    def admit(self) -> list[Any]:
        """One pass over the queue; returns whom it admitted. As ``Scheduler._get_new_batch_prefill_raw``."""
        running, self.calls = self.running, {"looked at": 0, "matched": 0}
        if not running.reqs:
            running.batch_is_full = False
        if running.batch_is_full or not self.queue or len(running.reqs) >= self.rows:
            return []
        adder = EloraPrefillAdder(
            self.harness.page_size,
            self.cache,
            self.harness.allocator,
            running,
            1.0,
            4096,
            None,
            max_running_requests=self.rows,
        )
        for req in self.queue:
            if adder.budget_state() is AddReqResult.OTHER:
                break
            self.calls["looked at"] += 1
            if not may_schedule(self.scheduler, req):
                continue
            if len(adder.can_run_list) + len(running.reqs) >= self.rows:
                running.batch_is_full = True
                break
            self.calls["matched"] += 1
            self.harness.match(req)
            verdict = adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
            if verdict is not AddReqResult.CONTINUE:
                if verdict is AddReqResult.NO_TOKEN:
                    running.batch_is_full = bool(adder.can_run_list or running.reqs)
                break
        for req in adder.can_run_list:
            self.waits[req.rid] = self.rule.batches - self._queued[req.rid]
        admitted = {req.rid for req in adder.can_run_list}
        self.queue = [req for req in self.queue if req.rid not in admitted]
        return list(adder.can_run_list)

    def iterate(self) -> list[Any]:
        """One scheduler iteration; returns whom it admitted."""
        self.cache.tick(len(self.running.reqs), bool(self.queue))
        batch, admitted, harness = self.admit(), True, self.harness
        if not batch:
            batch, admitted = list(self.running.reqs), False
        self.cache.manager.batch([req.rid for req in batch] if admitted else [], not admitted)
        for req in batch:
            if admitted:
                harness._next_row = harness._next_row % 1000 + 1
                req.kv.req_pool_idx, req.kv.holds_kv = harness._next_row, True
                harness._extend_row(req, self.cache.prefix_device_indices(req))
                self.running.reqs.append(req)
            else:
                row = harness.rows.req_to_token[req.kv.req_pool_idx]
                req.full_untruncated_fill_ids.append(req.output_ids[-1])
                harness._extend_row(req, row[: req.kv.kv_allocated_len].long())
            req.output_ids.append(1)
            if len(req.output_ids) >= req.length:
                self.running.reqs.remove(req)
                self.running.batch_is_full = False
                harness.finish(req, checkpoint=False)
        return batch if admitted else []

    def drain(self) -> None:
        """Serve all that wait or run."""
        while self.queue or self.running.reqs:
            before = self.rule.batches
            self.iterate()
            assert self.rule.batches > before
