"""``--elora`` in the launcher, from the arguments as given to the arguments as resolved.

:func:`apply_settings` is the one way in, for the command line and for ``sglang.Engine(elora=True, …)``. It attaches
the config and refuses what it can see already. It adds two steps to SGLang's argument resolution: the first for the
settings that ``--elora`` implies, the last for the final checks and the hooks of the tokenizer process, which this
process becomes. The heavy modules are imported by then anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from elora_sglang.integration.plugin import config, counter, flags_lora, refusals, verify
from elora_sglang.integration.plugin.install import install, installed_names, uninstall
from elora_sglang.patches.base import Process, When, discover, select

logger = logging.getLogger(__name__)

_SOURCE = "elora"


def apply_settings(server_args: Any, settings: config.EloraConfig) -> Any:
    """Make these server arguments ELORA's (or, when disabled, stock's) and return them.

    Mutates the arguments' bookkeeping, the environment and SGLang's list of resolution steps. Stock arguments
    after ELORA's in one process take the launcher's hooks away again, so two engines of both kinds may follow
    each other in one process, but not live in it at the same time.

    Raises:
        Refused: a flag that ``--elora`` does not work with, or an SGLang that does not fit.
    """
    config.attach(server_args, settings)
    records = discover()
    steps = select(records, process={Process.MAIN}, when={When.ELORA})
    if not settings.enabled:
        if getattr(server_args, "lora_backend", None) == "elora":
            raise verify.Refused("--lora-backend elora needs --elora; add --elora")
        uninstall(select(records, process={Process.MAIN, Process.TOKENIZER}, when={When.ELORA}))
        return server_args
    _refuse_first(refusals.refused_flags(server_args))
    verify.check_surface()
    verify.check_all(steps)
    install(steps)
    verify.require_in_place(steps)
    return server_args


def _refuse_first(rows: Any) -> None:
    row = next(iter(rows), None)
    if row is not None:
        raise verify.Refused(row.message)


def imply_settings(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step ``handle_missing_default_values``: the settings that ``--elora`` implies."""
    if not config.current(server_args).enabled:
        previous(server_args)
        return
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    args = resolving_view(server_args)
    if args.device is None and on_elora_cpu_platform():
        # SGLang's own default asks the platform for a string and gets a torch.device.
        declare_resolution(server_args, _SOURCE, device="cpu")
    previous(server_args)
    for line in flags_lora.warnings(args, type(server_args)(model_path=args.model_path)):
        logger.warning("elora: %s", line)
    # The Triton kernels read static tables, which decode graphs can replay; plain PyTorch reads slot lists on the host.
    on_cuda = resolving_view(server_args).device == "cuda"
    declare_resolution(
        server_args,
        _SOURCE,
        radix_cache_backend="elora",
        **({"disable_prefill_cuda_graph": True} if on_cuda else {"disable_cuda_graph": True}),
        **flags_lora.implied_values(args),
    )


def on_elora_cpu_platform() -> bool:
    """Whether SGLang chose our CPU platform in this process. Imports SGLang's platforms."""
    from sglang.srt.platforms import current_platform

    return type(current_platform).__module__.startswith("elora_sglang.platform")


def final_checks(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step ``validate_deepep_v2_dispatch_token_budget``, SGLang's last: refuse, then hook.

    Everything is known here: flags that model-specific defaults turned on, and the model itself.
    """
    previous(server_args)
    if not config.current(server_args).enabled:
        return
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    args = resolving_view(server_args)
    # The platform may choose after `imply_settings` how many requests run at once.
    _follow_running_requests(server_args, args)
    _refuse_first(refusals.refused_flags(args))
    _refuse_first(refusals.refused_models(model_config_of(server_args)))
    install_tokenizer_hooks()


def _follow_running_requests(server_args: Any, args: Any) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(
        server_args,
        _SOURCE,
        max_loras_per_batch=flags_lora.implied_values(args)["max_loras_per_batch"],
    )


def install_tokenizer_hooks() -> None:
    """Hook the tokenizer side of this process and see that every hook took. Mutates SGLang's modules."""
    _install_now(select(discover(), process={Process.TOKENIZER}, when={When.ELORA}))


def install_scheduler_hooks() -> None:
    """The same for a scheduler that runs in this process; idempotent."""
    _install_now(verify.scheduler_patches())


def _install_now(patches: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    new = [patch for patch in patches if patch.name not in installed_names()]
    verify.check_all(new)
    install(new)
    HookRegistry.apply_hooks()
    verify.require_in_place(patches)


def engine_arguments(stock: Callable[..., Any]) -> Callable[..., Any]:
    """ATTRIBUTE ``Engine.server_args_class``: a factory that takes ``elora=True, elora_policy=…`` as well."""

    def server_args(**keywords: Any) -> Any:
        counter.count("engine_arguments")
        own = {k: keywords.pop(k) for k in list(keywords) if k == "elora" or k.startswith("elora_")}
        return apply_settings(stock(**keywords), config.from_keywords(own))

    return server_args


def engine_schedulers(stock: Callable[..., Any]) -> Callable[..., Any]:
    """ATTRIBUTE ``Engine.run_scheduler_process_func``: ours for SGLang's own; another plugin's stays."""
    from sglang.srt.managers import scheduler

    return run_scheduler_process if stock is scheduler.run_scheduler_process else stock


def run_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process for ``sglang.Engine``, with ELORA's hooks even when it was *forked*.

    A spawned process runs SGLang's plugin loader, a forked one has inherited the mark that it ran.
    """
    from sglang.srt.managers import scheduler
    from sglang.srt.plugins import load_plugins

    counter.count("engine_schedulers")
    load_plugins()
    if config.current(server_args).enabled:
        install_scheduler_hooks()
    return scheduler.run_scheduler_process(server_args, *args, **kwargs)
