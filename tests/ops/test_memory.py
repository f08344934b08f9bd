"""What a pass on the CPU takes beside arguments and results, at an N whose X̂ and Ŷ would take hundreds of MiB."""

import pytest
import torch

import strassen_tile as stl
from memory import peak, size
from strassen_tile.ops.cpu import panels, tiles

N, K, M = 1 << 14, 250, 260
# tile, rank, dtype, scope, what is unusual: everything the compiled kernels take no part in, and what they do.
CASES = {
    "compiled": ((4, 4, 4), 24, torch.float32, "layer", ""),
    "odd tile": ((3, 3, 3), 12, torch.float32, "layer", ""),
    "one odd side": ((4, 4, 3), 24, torch.float32, "layer", ""),
    "tile scope": ((4, 4, 4), 24, torch.float32, "tile", ""),
    "float16": ((4, 4, 4), 24, torch.float16, "layer", ""),
    "float64": ((4, 4, 4), 24, torch.float64, "layer", ""),
    "transposed": ((4, 4, 4), 24, torch.float32, "layer", "transposed"),
    "many samples": ((3, 4, 3), 24, torch.float32, "layer", "samples"),
    "no compiler": ((4, 4, 4), 24, torch.bfloat16, "layer", "no compiler"),
    "all at once": ((3, 3, 5), 16, torch.float64, "tile", "transposed"),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def operands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    (p, q, s), r, dtype, scope, unusual = request.param
    j, l = -(-K // q), -(-M // s)  # noqa: E741
    lead = (j,), (l,)
    shapes = (
        (r, j, l),
        (*(lead[0] if scope == "tile" else ()), r, p, q),
        (*(lead[1] if scope == "tile" else ()), r, p, s),
    )
    x = torch.randn(1, K, N).mT if unusual == "transposed" else torch.randn(1, N, K)
    x = x.to(dtype).reshape(N // 16, 16, K) if unusual == "samples" else x.to(dtype)
    assert x.is_contiguous() == (unusual != "transposed")
    if unusual == "no compiler":
        monkeypatch.setattr(tiles, "_kernels", None)
    # As large an N in proportion as 64 MiB would need, at a quarter of the time.
    for name in ("INFERENCE_BYTES", "TRAINING_BYTES"):
        monkeypatch.setattr(panels, name, getattr(panels, name) // 16)
    vars(panels._held).clear()
    return [x, *(torch.randn(shape).to(dtype) for shape in shapes), torch.randn(M).to(dtype)]


def test_of_inference(operands: list[torch.Tensor]) -> None:
    with torch.no_grad():
        y, most = peak(lambda: stl.stl_linear(*operands, out_features=M, activation="relu"))
    assert most <= size([y]) + panels.INFERENCE_BYTES + (1 << 18)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_of_a_training_step(operands: list[torch.Tensor], recompute: bool) -> None:
    """Beside the gradients and Ŷ; a gradient that `sum` sends has no memory of its own, and is given none."""
    for tensor in operands:
        tensor.requires_grad_()
    y, forward = peak(lambda: stl.stl_linear(*operands, out_features=M, recompute=recompute))
    (r, _, l), p = operands[1].shape, operands[2].shape[-2]  # noqa: E741
    kept = 0 if recompute else r * -(-N // p) * l * y.element_size() * (1 + p / 16)  # 16 rows a sample leave some over
    assert forward <= size([y]) + kept + panels.TRAINING_BYTES + (1 << 18)
    vars(panels._held).clear()
    gradients, backward = peak(lambda: torch.autograd.grad(y.sum(), operands))
    wide = 4 * operands[1].numel() if y.element_size() == 2 else 0  # the float32 sum of dŴ
    assert backward <= size(gradients) + wide + panels.TRAINING_BYTES + (1 << 18)
