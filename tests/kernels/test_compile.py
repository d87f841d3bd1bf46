"""Every Triton kernel compiles for GPUs that this machine does not have: sm_80 and sm_90."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elora_sglang.kernels.page_copy import triton_kernel as page_copy
from elora_sglang.kernels.paged_lora import triton_kernel as paged_lora

LORA_SIZES = {"COLS": 4096, "K_ROW": 1024, "V_ROW": 1024, "VEC": 8, "RANKS": 16, "BLOCK": 128, "WIDE": 0}
TABLES = {"order": "*i64", "tiles": "*i32", "adapters": "*i64"}
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, int]]] = {
    f"{name} {dtype}, tiles of {rows}, {splits} splits": (kernel, signature, sizes)
    for dtype, rows, splits in (("bf16", 16, 4), ("fp16", 64, 1))
    for name, kernel, signature, sizes in (
        (
            "shrink",
            paged_lora._shrink,
            {
                "x": f"*{dtype}", "x_stride": "i32", "h": "*fp32", "h_split": "i32", "h_stride": "i32",
                "pool": f"*{dtype}", "between": "i64", **TABLES, "place": "i32",
            },
            LORA_SIZES | {"ROWS": rows, "SPLITS": splits},
        ),
        (
            "expand",
            paged_lora._expand,
            {
                "h": "*fp32", "h_split": "i32", "h_stride": "i32", "out": f"*{dtype}", "out_stride": "i32",
                "pool": f"*{dtype}", "between": "i64", **TABLES, "scalings": "*fp32", "place": "i32",
            },
            LORA_SIZES | {"ROWS": rows, "SPLITS": splits},
        ),
    )
}  # fmt: skip
KERNELS["page copy"] = (
    page_copy._copy,
    {
        "source": "*i64", "target": "*i64", "sources": "*i64", "targets": "*i64", "source_slots": "*i32",
        "target_slots": "*i32", "count": "i32", "first_layer": "i32",
    },
    {"K_WORDS": 256, "V_WORDS": 256, "SLOTS": 4, "WORDS": 256},
)  # fmt: skip


#: Arguments that are multiples of 16 when they are launched, as Triton finds out by itself then.
EVEN = ("x_stride", "out_stride", "h_stride", "h_split", "between")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_to_wide_loads(name: str, capability: int) -> None:
    kernel, signature, sizes = KERNELS[name]
    types = signature | dict.fromkeys(sizes, "constexpr")
    names = list(kernel.arg_names)
    even = [argument for argument in names if types[argument].startswith("*") or argument in EVEN]
    source = ASTSource(
        kernel,
        {argument: types[argument] for argument in names},
        constexprs={(names.index(argument),): value for argument, value in sizes.items()},
        attrs={(names.index(argument),): [["tt.divisibility", 16]] for argument in even},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    ptx = made.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    # Rows are found by the kernel, and yet are read 16 bytes at a time, like plain memory.
    if name.startswith("shrink"):
        wide = re.search(
            r"async_copy_global_to_local .*contiguity = (\d+) .*tensor<16x\d+x(\d+)x!tt.ptr",
            made.asm["ttgir"],
        )
        assert wide is not None and wide[1] == wide[2] == str(sizes["VEC"])
    else:
        loads = re.findall(r"ld\.global\.(v4\.b32|v2\.b64)", ptx)
        assert len(loads) >= 4
