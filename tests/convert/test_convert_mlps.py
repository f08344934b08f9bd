"""Blocks that are MLPs of converted layers: recognised by what they compute, in one step only where that changes nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn

import strassen_tile as stl
from strassen_tile.convert.mlps import recognise

EXACT = stl.STLConfig(rank=49, basis="strassen")


class Plain(nn.Module):
    """Two layers under names of its own, the activation a function; switches make it something else."""

    def __init__(self, activate=torch.relu, before=None, after=None, wide=12):
        super().__init__()
        self.b, self.a = nn.Linear(wide, 8), nn.Linear(8, 12)
        self.activate, self.before, self.after = activate, before or (lambda x: x), after or (lambda x, y: y)

    def forward(self, x):
        return self.after(x, self.b(self.activate(self.a(self.before(x)))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12, bias=False), nn.Linear(12, 6, bias=False), nn.Linear(8, 12)

    def forward(self, hidden):
        return self.w2(nn.functional.silu(self.w1(hidden)) * self.w3(hidden))


class Network(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.head = block, nn.Linear(8, 3)

    def forward(self, x):
        return self.block(x)


def sequential(*between):
    return nn.Sequential(nn.Linear(8, 12), *between, nn.Linear(12, 8))


def linears(block):
    return {name: m for name, m in block.named_children() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize(
    "block,expected",
    [
        (Plain(), ("a", "b", None, "relu")),
        (Plain(nn.functional.silu), ("a", "b", None, "silu")),
        (Plain(lambda x: x), ("a", "b", None, "none")),
        (Gated(), ("w3", "w2", "w1", "silu")),
        (sequential(nn.GELU()), ("0", "2", None, "gelu")),
        (sequential(nn.GELU("tanh"), nn.Dropout(0.3)), ("0", "3", None, "gelu_tanh")),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), ("0", "2", None, "relu")),
        (sequential(nn.Tanh()), None),
        (sequential(nn.ReLU(), nn.LayerNorm(12)), None),
        (sequential(nn.PReLU()), None),
        (sequential(nn.BatchNorm1d(12, affine=False)), None),
        (Plain(before=lambda x: 2 * x), None),
        (Plain(after=lambda x, y: x + y), None),
        (Plain(after=lambda x, y: (y,)), None),
        (Plain(after=lambda x, y: y.mean()), None),
        (Plain(before=lambda x: x.view(1, 2, 8)), None),
        (
            Plain(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
            None,
        ),  # a constant too short
    ],
    ids=lambda value: None if value is None or isinstance(value, tuple) else type(value).__name__,
)
def test_what_is_recognised(block: nn.Module, expected: tuple | None) -> None:
    layers, before = linears(block), {name: copy.deepcopy(m.state_dict()) for name, m in linears(block).items()}
    assert recognise(block, layers) == expected
    assert linears(block) == layers
    assert all(m.training for m in block.modules())
    for name, state in before.items():
        torch.testing.assert_close(linears(block)[name].state_dict(), state, rtol=0, atol=0)


def test_a_block_that_says_more_than_x_is_left() -> None:
    class Takes(Plain):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    hooked = Plain()
    hooked.register_forward_hook(lambda *_: None)
    patched = Plain()
    patched.forward = lambda x: x
    for block in (Takes(), hooked, patched):
        assert recognise(block, linears(block)) is None


def test_layers_that_do_not_fit_are_no_mlp() -> None:
    """Probes have sizes of their own; the block's must agree too."""
    block = Plain(wide=13)
    assert recognise(block, linears(block)) is None


@pytest.mark.parametrize(
    "make", [lambda: Plain(nn.functional.gelu), Gated, lambda: sequential(nn.SiLU(), nn.Dropout(0.5))]
)
def test_a_converted_block_computes_what_it_did(make) -> None:
    """With an exact basis, against the dense block: in inference, in training with its dropout, and its gradients."""
    block, x = make().double(), torch.randn(2, 7, 8, dtype=torch.float64)
    network = Network(copy.deepcopy(block))
    conversion = stl.convert(network, EXACT)
    assert conversion.mlps == ["block"]
    assert "run as MLPs: block" in str(conversion)
    assert isinstance(network.block, stl.STLMLP)
    assert isinstance(network.block, type(block))
    assert network.block.state_dict().keys() == {
        key.replace("weight", name)
        for key in block.state_dict()
        for name in (["encoder", "encoded_weight", "decoder"] if "weight" in key else [key])
    }
    for training in (False, True):
        block.train(training)
        network.train(training)
        for learning in (False, True):
            with torch.set_grad_enabled(learning):
                torch.manual_seed(3)
                expected = block(x)
                torch.manual_seed(3)
                torch.testing.assert_close(network(x), expected)
    conversion.undo()
    assert type(network.block) is type(block)
    assert torch.equal(network.eval()(x), block.eval()(x))


def steps_of(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    original = stl.STLMLP._one_step
    monkeypatch.setattr(stl.STLMLP, "_one_step", lambda *a: taken.append(1) or original(*a))
    return taken


def test_one_step_is_taken_only_where_nobody_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in training, a hook, another activation, a layer put in place of one: each is honoured."""
    block = sequential(nn.GELU(), nn.Dropout(0.5))
    network, x = Network(block), torch.randn(2, 7, 8)
    stl.convert(network, EXACT)
    taken = steps_of(block, monkeypatch)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        assert len(taken) == 1
        assert not torch.equal(network.train()(x), expected)
        network.eval()
        block[2].train()  # dropout kept on, for Monte Carlo
        assert not torch.equal(network(x), expected)
        network.eval()
        for part in block:
            seen: list[torch.Tensor] = []
            handle = part.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
            torch.testing.assert_close(network(x), expected)
            handle.remove()
            assert len(seen) == 1
        assert len(taken) == 1
        block[1] = nn.ReLU()
        other = network(x)
        assert not torch.allclose(other, expected)
        block[0] = nn.Linear(8, 12)
        assert not torch.allclose(network(x), other)
        assert len(taken) == 1


def test_padding_rows_stay_out_of_an_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """act(bias) of a padding row must not reach a real one: while there is a mask, the layers run one by one."""
    network = Network(sequential(nn.GELU()))
    conversion = stl.convert(network, stl.STLConfig(rank=49))
    taken, x = steps_of(network.block, monkeypatch), torch.randn(1, 8, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    network.eval()
    with torch.no_grad():
        short = network(x[:, :5])
        assert len(taken) == 1
        with conversion.padding(mask):
            torch.testing.assert_close(network(x)[:, :5], short)
        assert len(taken) == 1
        assert not torch.allclose(network(x)[:, :5], short), "rows mix: without the mask the padding would be seen"


def test_an_adopted_block_is_a_module_like_others() -> None:
    block = sequential(nn.GELU())
    network, x = Network(block), torch.randn(2, 7, 8)
    stl.convert(network, EXACT)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert type(other.block) is type(block)
            assert torch.equal(other(x), expected)
            other.block[0].encoder.zero_()
            assert not torch.equal(other(x), expected), "the copy runs its own layers"
            assert torch.equal(network(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), expected)
    assert type(block[:1]) is nn.Sequential
    assert len(block) == 3


@pytest.mark.parametrize("family,blocks", [("Llama", 1), ("Qwen2", 1), ("Dinov2", 1), ("SiglipVision", 2)])
def test_blocks_of_transformers(family: str, blocks: int) -> None:
    """Siglip's second one is in its pooling head."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = family in ("Llama", "Qwen2")
    sizes |= (
        {"vocab_size": 64, "num_key_value_heads": 1} if text else {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    )
    inputs = {"input_ids": torch.arange(9)[None]} if text else {"pixel_values": torch.randn(1, 3, 28, 28)}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}{'ForCausalLM' if text else 'Model'}")(config).eval()
    exact = stl.STLConfig(rank=16, basis="naive", mixing="none") if text else EXACT
    with torch.no_grad():
        expected = model(**inputs)[0]
        conversion = stl.convert(model, exact, example_inputs=inputs)
        assert len(conversion.mlps) == blocks, str(conversion)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-3, atol=1e-4)
