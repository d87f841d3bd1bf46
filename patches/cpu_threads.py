"""Worker threads without SGLang's compiled CPU kernels."""

from elora_sglang.patches.base import Kind, Patch, When

PATCH = Patch(
    name="cpu_threads",
    target="sglang.srt.distributed.bootstrap._init_cpu_threads_env",
    kind=Kind.AROUND,
    hook="elora_sglang.platform.threads.without_kernel_threads",
    why="stock binds threads through a compiled kernel on every ARM machine; the released wheel has none there",
    upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/distributed/bootstrap.py",
    remove_when="SGLang asks for the kernel before it calls it",
    when=When.CPU,
)
