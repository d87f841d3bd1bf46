"""What SGLang means without stating it: the few things that reading its source alone does not show."""

#: Names that mean one class all over SGLang, for where neither it nor we annotate them.
CONVENTIONS = {
    "forward_batch": "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "lora_manager": "sglang.srt.lora.lora_manager.LoRAManager",
    "model_config": "sglang.srt.configs.model_config.ModelConfig",
    "model_runner": "sglang.srt.model_executor.model_runner.ModelRunner",
    "program": "sglang.lang.ir.SglFunction",
    "runner": "sglang.srt.model_executor.model_runner.ModelRunner",
    "scheduler": "sglang.srt.managers.scheduler.Scheduler",
    "server_args": "sglang.srt.server_args.ServerArgs",
    "tokenizer_manager": "sglang.srt.managers.tokenizer_manager.TokenizerManager",
    "tp_group": "sglang.srt.distributed.parallel_state.GroupCoordinator",
    "tp_worker": "sglang.srt.managers.tp_worker.TpModelWorker",
}
#: Classes whose fields SGLang assembles at import from the classes of a package, one a namespace.
ASSEMBLED = {"sglang.srt.server_args.ServerArgs": "sglang.srt.arg_groups.fields"}
#: Views that pass every read on to an object of another class.
VIEWS = {
    "sglang.srt.arg_groups.model_override_base.ResolvingConfig": "sglang.srt.server_args.ServerArgs",
    "sglang.srt.arg_groups.model_override_base.ResolvedView": "sglang.srt.server_args.ServerArgs",
}
