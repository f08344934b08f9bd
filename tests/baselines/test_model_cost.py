"""If these fail, a table states a wrong count: of FLOPs, of parameters, or of the share that was converted."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile import STLConfig, STLLinear, baselines, models
from strassen_tile.baselines import model_cost
from strassen_tile.errors import ConfigError


class Model(nn.Module):
    """8 → 12 twice (one layer called twice), an attention product, and a head of 5."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return self.head((x @ x.mT).softmax(dim=-1) @ x)


X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))  # unscaled attention of others may saturate
LINEAR = 2 * 21 * 8 * 12  # one of the four calls of up and down
REST = 2 * (2 * 3 * 7 * 7 * 8) + 2 * 21 * 8 * 5
CONFIGS = {
    "ragged": STLConfig(tile=4, rank=24),
    "flat": STLConfig(tile=(2, 3, 5), rank=7),
    "rows apart": STLConfig(tile=4, rank=6, mixing="none"),
    "causal": STLConfig(tile=4, rank=9, mixing="causal"),
    "per tile": STLConfig(tile=4, rank=9, encoder_scope="tile"),
}


def counted(model, x=X):
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stl_is_counted_as_the_counter_counts_it(config):
    model = Model()
    before = counted(model)
    conversion = baselines.stl(config).apply(model, X, None)
    cost = model_cost(model, conversion, X)
    assert cost.flops == counted(model)
    assert cost.saved.keys() == conversion.converted.keys()
    assert sum(cost.saved.values()) == cost.dense_flops - cost.flops  # of every call
    assert cost.dense_flops == before == 4 * LINEAR + REST
    assert cost.converted.dense_flops == 4 * LINEAR
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.share == 4 * LINEAR / (4 * LINEAR + REST)
    assert cost.flop_ratio == counted(model) / before


def test_stl_by_hand():
    model = Model()
    cost = model_cost(model, baselines.stl(STLConfig(tile=4, rank=24)).apply(model, X, None), X)
    tiles, r = 3 * 2, 24  # 7 rows are two tiles a sample
    up = 2 * r * (tiles * 4 * 8 + tiles * 2 * 3 + tiles * 4 * 12)  # encode, products, decode
    down = 2 * r * (tiles * 4 * 12 + tiles * 3 * 2 + tiles * 4 * 8)
    assert cost.converted.flops == 2 * (up + down)
    assert cost.converted.product_flops == 2 * 2 * (2 * r * tiles * 6)
    assert cost.flops == REST + 2 * (up + down)
    factors = 2 * r * 16
    assert cost.params == 2 * (r * 6 + factors) + 12 + 8 + 45


def test_dense_is_the_counters_count():
    model = Model()
    done = baselines.dense().apply(model, X, None)
    cost = model_cost(model, done, X)
    assert list(done.converted) == ["up", "down"]
    assert cost.flops == cost.dense_flops == counted(model)
    assert cost.flop_ratio == 1.0
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_24_is_half_of_what_is_converted():
    model = Model()
    cost = model_cost(model, baselines.sparse_24().apply(model, X, None), X)
    assert cost.flops == 2 * LINEAR + REST
    assert cost.dense_flops == 4 * LINEAR + REST
    assert cost.converted.flop_ratio == 0.5


@pytest.mark.parametrize("method", [baselines.low_rank(0.5), baselines.token_mix(4)], ids=["low-rank", "mix"])
def test_other_baselines_are_the_counters_count(method):
    model = Model()
    cost = model_cost(model, method.apply(model, X, None), X)
    assert cost.flops == counted(model)
    assert cost.dense_flops == 4 * LINEAR + REST


def test_frozen_parameters_are_not_counted_as_trained():
    model = Model()
    model.head.requires_grad_(False)
    cost = model_cost(model, baselines.dense().apply(model, X, None), X)
    assert cost.params == 8 * 12 + 12 + 12 * 8 + 8


def test_count_is_of_the_inputs_given_not_of_those_converted_with():
    model = Model()
    done = baselines.stl(STLConfig(rank=24)).apply(model, X, None)
    cost = model_cost(model, done, X[:1])
    assert cost.flops == counted(model, X[:1])
    assert cost.dense_flops == (4 * LINEAR + REST) // 3
    blind = baselines.stl(STLConfig(rank=6, mixing="none")).apply(Model(), None, lambda module, name: name != "head")
    assert set(blind.converted) == {"up", "down"}


def test_conversion_that_saw_no_inputs_can_be_counted():
    model = Model()
    done = baselines.stl(STLConfig(rank=6, mixing="none")).apply(model, None, None)
    assert model_cost(model, done, X).flops == counted(model)


def test_attention_by_the_library_is_counted_on_a_cpu_too():
    class Attention(Model):
        def forward(self, x):
            x = self.down(self.up(x).relu())
            return self.head(F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]).squeeze(1)).relu()

    model = Attention()
    cost = model_cost(model, baselines.dense().apply(model, X, None), X)
    with sdpa_kernel(SDPBackend.MATH):
        assert cost.flops == counted(model) == 2 * LINEAR + REST
    assert counted(model) < cost.flops  # what the counter alone would print


def test_fused_encoder_layer_is_counted():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    cost = model_cost(model, baselines.stl(STLConfig(rank=24)).apply(model, X, None), X)
    attention = 2 * 21 * 8 * 24 + 2 * 21 * 8 * 8 + 2 * (2 * 3 * 7 * 7 * 8)
    assert cost.dense_flops == 2 * LINEAR + attention


@pytest.mark.slow
def test_t2t_vit():
    x = torch.randn(2, 1, 8, 8)
    model = models.t2t_vit("t2t_vit_nano", num_classes=10, image_size=8, in_channels=1)
    before = counted(model, x)
    done = baselines.stl(STLConfig(rank=24)).apply(model, x, lambda module, name: name.startswith("blocks."))
    cost = model_cost(model, done, x)
    assert (cost.flops, cost.dense_flops) == (counted(model, x), before)
    assert 0.5 < cost.share < 1.0


def test_mode_hooks_and_randomness_are_left_as_they_were():
    model = Model().train()
    done = baselines.stl(STLConfig(rank=24)).apply(model, X, None)
    state = torch.get_rng_state()
    first = model_cost(model, done, X)
    assert model_cost(model, done, X) == first
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, STLLinear))


def test_layers_of_unknown_cost_are_refused():
    model = Model()
    done = baselines.dense().apply(model, X, None)
    model.up = done.converted["up"] = nn.Bilinear(8, 8, 12)
    model.up.forward = lambda x: torch.zeros(*x.shape[:-1], 12)
    with pytest.raises(ConfigError, match="Bilinear has no cost"):
        model_cost(model, done, X)


def test_label_says_name_and_rank():
    assert baselines.stl(STLConfig(rank=24)).label == "stl r=24"


def test_products_of_experts_count():
    """Each token meets two of four experts, in products that PyTorch's counter takes for free."""
    tokens, width, inner, vocabulary = 6, 16, 24, 50
    config = transformers.MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=vocabulary,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    done = baselines.dense().apply(model, None, lambda module, name: name.endswith("q_proj"))
    cost = model_cost(model, done, {"input_ids": torch.zeros(1, tokens, dtype=torch.long)})
    attention = (
        2 * width * (2 * width + 2 * width // 2) + 2 * 2 * tokens * width
    )  # q and o, k and v; scores and their sum
    experts = 2 * 3 * 2 * width * inner
    router, head = 2 * width * 4, 2 * width * vocabulary
    assert cost.dense_flops == tokens * (2 * (attention + experts + router) + head)
