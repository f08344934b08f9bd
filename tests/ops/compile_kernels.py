"""Compile every kernel for an NVIDIA GPU that is not there, and print what the compiler made of it, as JSON lines.

Run as a script, without TRITON_INTERPRET: `python compile_kernels.py 90`. Sizes and strides are taken as multiples of 16,
which is the case where speed is promised.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from strassen_tile.ops.cuda import kernels, launch, tap_kernels, taps

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    "x", "factor", "encoded", "bias", "y", "decoder", "encoder", "out", "scale", "shift", "sums", "row_scale",
    "up", "up_decoder", "up_bias", "grad", "weight",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(kernel, element: str, constants: dict, capability: int) -> dict:
    names, warps = kernel.arg_names, constants.pop("num_warps")
    signature, attrs = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in POINTERS:
            signature[name] = f"*{element}"
            if name in ("sums", "row_scale", "weight") or (name == "scale" and constants.get("SCALED")):
                signature[name] = "*fp32"
            elif name == "encoded" and constants.get("SCALED"):
                signature[name] = "*fp8e4nv"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name not in ("rank", "up_rank", "next_rank", "eps", "total", "tile_rows", "blocks", "before"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=attrs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    fields = dict(part.split(":") for part in usage.split() if part.count(":") == 1 and part.split(":")[1].isdigit())
    return {
        "registers": int(fields["REG"]), "stack": int(fields["STACK"]), "local": int(fields["LOCAL"]),
        "shared": int(fields["SHARED"]), "wide_stores": sass.count("STG.E.128"), "wide_loads": sass.count("LDG.E.128"),
        "tensor_core": sass.count("HMMA") + sass.count("HGMMA"),
    }  # fmt: skip


TILES = (((4, 4), 16), ((4, 4), 24), ((4, 4), 32), ((4, 4), 49), ((8, 8), 64), ((2, 4), 24), ((1, 4), 6), ((2, 2), 7))


def variants(capability: int):
    """(name, kernel, element, constants) of what is promised to be fast, in blocks as taken for lack of a measurement."""
    for tile, rank in TILES:
        for element in TYPES if (tile, rank) == ((4, 4), 24) else ("bf16",):
            label, p, q = f"{tile[0]}x{tile[1]} r={rank} {element}", *tile

            def sizes(step, dtype=TYPES[element], p=p, q=q, rank=rank):
                return {**launch.compile_time(step, p, q, rank, torch.empty(0, dtype=dtype)), "UPCAST": False}

            dense = {"stride_k": 1}
            for per_tile in (False, True):
                scope, plain = " per tile" * per_tile, {"SCALED": False}
                yield (
                    f"encode{scope} {label}",
                    kernels.encode_kernel,
                    element,
                    {**launch.blocks(sizes("encode"), per_tile), **dense, **plain},
                )
                for activation in ("none", "gelu_tanh") if rank == 24 and not per_tile else ("none",):
                    extra = {"BIAS": True, "ACTIVATION": activation, **plain}
                    yield (
                        f"decode{scope} {label} {activation}",
                        kernels.decode_kernel,
                        element,
                        {**launch.blocks(sizes("decode"), per_tile), **extra},
                    )
            if element == "bf16" and capability >= 90:  # fp8 is from 8.9 on
                scaled = {**launch.blocks(sizes("encode", torch.float8_e4m3fn), False), **dense, "SCALED": True}
                yield f"encode to fp8 {label}", kernels.encode_kernel, element, scaled
            between = sizes("decode_act_encode")
            between |= {"UP_RANKS": between["RANKS"], "NEXT_RANKS": between["RANKS"], "BIAS": True, "UP_BIAS": True}
            del between["FAST"]
            for gated in (False, True):
                extra = {"ACTIVATION": "silu", "GATED": gated}
                yield (
                    f"decode_act_encode {label} gated={gated}",
                    kernels.decode_act_encode_kernel,
                    element,
                    {**between, **extra},
                )
            yield f"correlate {label}", kernels.correlate_kernel, element, {**sizes("correlate"), **dense}
            normed = {**sizes("norm_encode"), **dense, "CENTRE": True, "SCALE": True, "SHIFT": True}
            del normed["ENTRIES"], normed["FAST"]
            yield f"norm {label}", kernels.norm_encode_kernel, element, normed
    block = {"TAPS": 4, "BN": taps._ROWS, "BK": taps._COLUMNS, "num_warps": taps._WARPS}
    for element in TYPES:
        yield f"taps {element}", tap_kernels.taps_kernel, element, {**block, "RESIDUAL": True}
        yield f"taps correlate {element}", tap_kernels.taps_correlate_kernel, element, {**block, "PADDED": 4}


if __name__ == "__main__":
    for name, kernel, element, constants in variants(int(sys.argv[1])):
        if len(sys.argv) > 2 and sys.argv[2] not in name:
            continue
        try:
            found = compiled(kernel, element, constants, int(sys.argv[1]))
        except Exception as error:  # said, and the others go on
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps({"name": name, **found}), flush=True)
