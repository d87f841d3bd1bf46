#: Environment variable of a baseline server: GB/s of the link model that its copies get, 0 for none.
ENV_LINK = "ELORA_EVAL_LINK_GBPS"

#: Module that starts a baseline server, as ``sglang.launch_server`` starts another.
LAUNCH = "elora_sglang.eval.baselines.launch"
