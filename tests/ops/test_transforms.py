"""torch.func, torch.compile, torch.export, opcheck and FLOP counting."""

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from operands import operands
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jacrev, vmap
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import strassen_tile as stl
from strassen_tile import cost
from strassen_tile.ops import schemas
from strassen_tile.ops.linear import composed_backward


def loss(*tensors: torch.Tensor) -> torch.Tensor:
    return stl.stl_linear(*tensors, out_features=6).square().sum()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_opcheck(dtype: torch.dtype, per_tile: bool, requires_grad: bool) -> None:
    o = operands("ragged", dtype, per_tile)
    x = o.x.requires_grad_(requires_grad)
    encoder, decoder = (f.requires_grad_(requires_grad) for f in (o.encoder, o.decoder))
    with torch.no_grad():
        encoded = schemas.encode(x, o.encoder)
        products = torch.bmm(encoded, o.encoded_weight)
        y, kept = schemas.linear_forward(x, o.encoded_weight, encoder, decoder, o.bias, 6)
    passes = (
        ()
        if requires_grad
        else (  # their gradient is that of `linear`
            (schemas.linear_forward, (x, o.encoded_weight, encoder, decoder, None, 6)),
            (schemas.linear_backward, (y, x, o.encoded_weight, encoder, decoder, kept, [True] * 5)),
            (
                schemas.linear_backward,
                (y, x, o.encoded_weight, encoder, decoder, None, [False, False, True, True, False]),
            ),
        )
    )
    for operator, arguments in (
        (schemas.encode, (x, encoder)),
        (schemas.decode, (products.requires_grad_(requires_grad), decoder, 2, 5, 6)),
        (schemas.correlate, (x, encoded.requires_grad_(requires_grad), list(encoder.shape[-2:]), per_tile)),
        (schemas.linear, (x, o.encoded_weight, encoder, decoder, o.bias, 6, "gelu")),
        *passes,
    ):
        results = opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_per_sample_gradients() -> None:
    o = operands("ragged")
    samples = torch.randn(4, 5, 7, dtype=torch.float64)
    rest = o.tensors[1:]
    found = vmap(grad(loss, argnums=(0, 1, 2, 3, 4)), in_dims=(0, None, None, None, None))(samples, *rest)
    for i, sample in enumerate(samples):
        leaves = [t.clone().requires_grad_() for t in (sample, *rest)]
        for got, expected in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(got[i], expected)


@pytest.mark.parametrize("argument", range(5), ids=["x", "encoded_weight", "encoder", "decoder", "bias"])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_any_argument(argument: int, dim: int) -> None:
    o = operands("ragged")
    stacked = torch.stack([o.tensors[argument], 2 * o.tensors[argument], -o.tensors[argument]], dim=dim)
    in_dims = [dim if i == argument else None for i in range(5)]
    arguments = [stacked if i == argument else t for i, t in enumerate(o.tensors)]
    y = vmap(lambda *t: stl.stl_linear(*t, out_features=6), in_dims=tuple(in_dims))(*arguments)
    for i, part in enumerate(stacked.unbind(dim)):
        one = [part if k == argument else t for k, t in enumerate(o.tensors)]
        torch.testing.assert_close(y[i], stl.stl_linear(*one, out_features=6))


def test_hessian_of_the_encoder() -> None:
    o = operands("ragged")
    hessian = jacrev(grad(lambda e: loss(o.x, o.encoded_weight, e, o.decoder, o.bias)))(o.encoder)
    size = o.encoder.numel()
    flat = hessian.reshape(size, size)
    torch.testing.assert_close(flat, flat.mT)
    direction = torch.randn_like(o.encoder)
    step = 1e-4

    def at(offset: float) -> torch.Tensor:
        return loss(o.x, o.encoded_weight, o.encoder + offset * direction, o.decoder, o.bias)

    # The loss is a quadratic in the encoder: the second difference is exact up to rounding.
    second = (at(step) - 2 * at(0) + at(-step)) / step**2
    torch.testing.assert_close(direction.flatten() @ flat @ direction.flatten(), second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    # Code is generated for one of them; for the other the graphs, which are what could break, are run as they are.
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="inductor" if dynamic else "aot_eager")
    for n in (5, 8, 1) if dynamic else (5,):
        o = operands("ragged", grad=True)
        tensors = (torch.randn(2, n, 7, dtype=torch.float64, requires_grad=True), *o.tensors[1:])
        found = torch.autograd.grad(compiled(*tensors), tensors)
        for got, expected in zip(found, torch.autograd.grad(loss(*tensors), tensors), strict=True):
            torch.testing.assert_close(got, expected)
    explained = torch._dynamo.explain(loss)(*operands("ragged").tensors)
    assert explained.graph_break_count == 0


def test_dynamic_rows_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    o = operands("ragged")
    for n in (11, 8, 9, 30):  # not 5, the rank: dynamo takes equal sizes for the same one
        compiled(torch.randn(2, n, 7, dtype=torch.float64), *o.tensors[1:])
    assert counter.frame_count == 1


def test_compiled_matmul() -> None:
    torch._dynamo.reset()
    basis = stl.bases.strassen(2)
    x, w = torch.randn(9, 13, dtype=torch.float64), torch.randn(13, 11, dtype=torch.float64)
    compiled = torch.compile(lambda x, w: stl.stl_matmul(x, w, basis), fullgraph=True)
    torch.testing.assert_close(compiled(x, w), x @ w)


def test_export_save_load_run(tmp_path) -> None:
    layer = stl.STLLinear(7, 6, config=stl.STLConfig(tile=(3, 2, 4), rank=5), dtype=torch.float64)
    dims = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")}}
    program = torch.export.export(layer, (torch.randn(2, 5, 7, dtype=torch.float64),), dynamic_shapes=dims)
    assert any("strassen_tile" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(3, 11, 7, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize("shape", ["ragged", "whole", "two leading"])
@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
def test_flops_are_counted_truly(shape: str, per_tile: bool) -> None:
    """Forward: encode, products, decode. Backward: one encode more, dX and dŴ, a correlation for E and one for D."""
    o = operands(shape, per_tile=per_tile, grad=True)
    lead, n, k = o.x.shape[:-2], *o.x.shape[-2:]
    p, q = o.encoder.shape[-2:]
    s, r = o.decoder.shape[-1], o.encoded_weight.shape[0]
    one = cost.linear(n, k, o.out_features, (p, q, s), r, batch=int(torch.tensor(lead).prod()))
    with FlopCounterMode(display=False) as forward:
        y = stl.stl_linear(*o.tensors, out_features=o.out_features)
    assert forward.get_total_flops() == one.flops
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    coding = one.flops - one.product_flops
    # encode dY, decode dX, correlate for E and for D: each as much as its forward counterpart; and X̂ is made anew
    again = 2 * r * o.encoder.shape[-2] * o.encoder.shape[-1] * one_encoded(o)
    assert backward.get_total_flops() == 2 * one.product_flops + 2 * coding + again


def one_encoded(o) -> int:
    """Numbers a channel of X̂."""
    with torch.no_grad():
        return schemas.encode(o.x.reshape(-1, *o.x.shape[-2:]), o.encoder)[0].numel()


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("asked", range(32), ids="{:05b}".format)
def test_flops_of_a_backward_pass_are_those_of_its_parts(asked: int, keep: bool) -> None:
    o = operands("ragged")
    wants = [bool(asked >> i & 1) for i in range(5)]
    y, kept = schemas.linear_forward(*o.tensors, o.out_features)
    arguments = (torch.randn_like(y), *o.tensors[:4], kept if keep else None, wants)
    with FlopCounterMode(display=False) as whole:
        schemas.linear_backward(*arguments)
    with FlopCounterMode(display=False) as parts:
        composed_backward(*arguments)
    assert whole.get_total_flops() == parts.get_total_flops()


def test_a_compiled_step_takes_the_fused_passes() -> None:
    """Traced piece by piece, the backward pass would multiply once more."""
    torch._dynamo.reset()
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    o = operands("ragged", grad=True)
    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    compiled(*o.tensors).backward()
    ours = [target for target in targets if "strassen_tile" in target or "bmm" in target]
    assert ours == ["strassen_tile.linear_forward.default", "strassen_tile.linear_backward.default"]
