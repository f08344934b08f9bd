"""A machine on which everything runs at one rate, so that predictions can be counted by hand."""

from strassen_tile import cost

FLAT = cost.Machine(
    "cpu",
    "float32",
    2,
    gemm=((128, 1e11), (2048, 1e11)),
    batched=((32, 1e11), (512, 1e11)),
    transform=1e11,
    copy=1e30,
    fresh=1e30,
    call=0.0,
)
