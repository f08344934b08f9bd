"""If these fail, what a sequence gives depends on how far its batch was padded. Broken on purpose, it is seen to."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from strassen_tile import STLConfig, STLLinear
from strassen_tile.errors import ShapeError
from strassen_tile.nn import PaddingMask

K, P = 6, 4
CONFIG = STLConfig(tile=(P, 2, 3), rank=7)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
X = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Plain(nn.Module):
    """Two row-mixing layers; takes no mask."""

    def __init__(self, config=CONFIG):
        super().__init__()
        self.padding = PaddingMask()
        self.first, self.second = (STLLinear(K, K, config=config, dtype=torch.float64) for _ in range(2))
        self.first.padding = self.second.padding = self.padding

    def forward(self, x):
        return self.second(self.first(x).relu())


class Masked(Plain):
    """Takes `attention_mask`, by name or as its second argument, and fails when told to."""

    fail = False

    def forward(self, x, attention_mask=None, past_key_values=None):
        y = self.second(self.first(x).relu())
        if self.fail:
            raise RuntimeError("out of memory")
        return y


def spread(model, **options):
    """The largest change of a real row when the sample stands alone, unpadded."""
    y = model(X, **options)
    alone = [model(X[i : i + 1, : int(MASK[i].sum())]) for i in range(3)]
    return max(float((y[i : i + 1, : a.shape[1]] - a).detach().abs().max()) for i, a in enumerate(alone))


def attached():
    model = Masked()
    model.padding.attach(model)
    return model


def test_layer_shows_no_trace_of_padding_inside_the_context():
    model = Plain()
    with model.padding(MASK):
        y = model(X)
        assert torch.equal(y, model(X))  # the second call inside is masked too
        noisy = torch.where(MASK[..., None] == 1, X, 1e6)
        assert torch.equal(model(noisy)[MASK == 1], y[MASK == 1])
    assert model.padding.mask is None
    assert not torch.equal(model(X)[MASK == 1], y[MASK == 1])  # without it padding is data


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_dtype_is_followed_by_name_and_by_position(dtype, monkeypatch):
    model, mask = attached(), MASK.to(dtype)
    assert spread(model, attention_mask=mask) < 1e-12
    assert torch.equal(model(X, mask), model(X, attention_mask=mask))
    assert spread(model) > 1e-3
    monkeypatch.setattr(PaddingMask, "zero", lambda self, x: x)
    assert spread(model, attention_mask=mask) > 1e-3


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[1, 1, 1], [0, 0, 1]]], ids=str)
def test_padding_before_real_rows_is_refused(mask):
    with pytest.raises(ShapeError, match="pad on the right"):
        attached()(torch.randn(len(mask), 3, K).double(), attention_mask=torch.tensor(mask))
    with pytest.raises(ShapeError, match="pad on the right"), PaddingMask()(torch.tensor(mask)):
        pass


def test_padding_on_the_left_would_indeed_show():
    model, x = Plain(), X[2:, :6]
    shifted = torch.cat([torch.zeros(1, 1, K, dtype=torch.float64), x], dim=1)
    assert not torch.allclose(model(shifted)[:, 1:], model(x), rtol=1e-3)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, 1, 7)], ids=["1-D", "3-D"])
def test_mask_of_another_shape_is_refused(mask):
    with pytest.raises(ShapeError, match=r"\(B, N\)"), PaddingMask()(mask):
        pass


def test_rows_that_the_mask_does_not_describe_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 6\).*\(3, 7, 6\)"):
        attached()(X, attention_mask=MASK[:, :6])
    with pytest.raises(ShapeError, match=r"does not say which rows are padding"):
        attached()(X, attention_mask=torch.ones(3, 1, 7, 7))
    model = attached()
    with model.padding(MASK):  # what the message asks for
        assert torch.equal(model(X, attention_mask=torch.ones(3, 1, 7, 7)), model(X))


def test_mask_is_gone_after_a_call_and_after_one_that_failed():
    model = attached()
    expected = model(X)
    model(X, attention_mask=MASK)
    assert model.padding.mask is None
    model.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(X, attention_mask=MASK)
    model.fail = False
    assert model.padding.mask is None
    with pytest.raises(ShapeError):
        model(X, attention_mask=MASK.flip(1))
    assert torch.equal(model(X), expected)
    with pytest.raises(ZeroDivisionError), model.padding(MASK):
        raise ZeroDivisionError
    assert torch.equal(model(X), expected)


def test_contexts_nest_and_a_call_may_bring_its_own_mask():
    model, other = attached(), torch.ones(3, 7)
    with model.padding(MASK):
        inside = model(X)
        with model.padding(other):
            assert torch.equal(model(X), model(X, attention_mask=other))
        assert torch.equal(model(X, attention_mask=other), model(X, attention_mask=torch.ones(3, 7)))
        assert torch.equal(model(X), inside)


def test_copies_do_not_share_the_mask():
    model = attached()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.first.padding is twin.second.padding is twin.padding is not model.padding
        with model.padding(MASK):
            assert twin.padding.mask is None
        assert torch.equal(twin(X, attention_mask=MASK), model(X, attention_mask=MASK))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_see_the_mask_again(reentrant):
    class Checkpointed(Masked):
        def forward(self, x, attention_mask=None):
            return self.second(checkpoint(self.first, x, use_reentrant=reentrant).relu())

    def gradients(kind):
        torch.manual_seed(0)
        model, found = kind(), []
        model.padding.attach(model)
        for mask in (MASK, torch.ones(3, 7), MASK):  # several steps, each with its own padding
            x = X.clone().requires_grad_()
            model.zero_grad()
            with torch.no_grad():
                model(X, attention_mask=MASK[:1].expand(3, -1))  # a look in between, which no backward pass follows
            model(x, attention_mask=mask)[mask == 1].square().sum().backward()
            found += [x.grad, *(p.grad.clone() for p in model.parameters())]
        return model, found

    model, found = gradients(Checkpointed)
    for a, b in zip(found, gradients(Masked)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # Two calls before one backward pass: it cannot be told which mask belongs to which layer.
    both = [model(X.clone().requires_grad_(), attention_mask=mask).sum() for mask in (MASK, torch.ones(3, 7))]
    with pytest.raises(ShapeError, match="checkpointed"):
        (both[0] + both[1]).backward()


class Cache:
    def __init__(self, rows):
        self.rows = rows

    def get_seq_length(self):
        return self.rows


@pytest.mark.parametrize("mixing", ["causal", "sequence"])
def test_a_cached_sequence_goes_on_only_where_a_tile_begins(mixing):
    model = Masked(STLConfig(tile=(P, 2, 3), rank=7, mixing=mixing))
    model.padding.attach(model)
    for rows in (0, P, 3 * P):
        model(X, past_key_values=Cache(rows))
    for rows in (1, P - 1, P + 1):
        with pytest.raises(ShapeError, match=f"a cache holds {rows} rows.*use_cache=False"):
            model(X[:, :1], past_key_values=Cache(rows))
    assert model.padding.past == 0


def test_handles_detach_the_mask():
    model = Masked()
    handles = model.padding.attach(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(X, attention_mask=MASK), model(X))


def test_compiles_with_the_mask():
    torch._dynamo.reset()
    model = attached()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, attention_mask=MASK), model(X, attention_mask=MASK))
    torch.testing.assert_close(compiled(X), model(X))
