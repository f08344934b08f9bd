"""If these fail, a part of a transformers model that is called past it lets padding leak, or is refused inside a call of it."""

import copy

import pytest
import torch

import strassen_tile
from strassen_tile import STLConfig, convert
from strassen_tile.errors import ShapeError

transformers = pytest.importorskip("transformers")

MASK = torch.arange(10) < torch.tensor([6, 9])[:, None]
IDS = torch.randint(1, 20, (2, 10), generator=torch.Generator().manual_seed(0))
OTHER_IDS = torch.where(MASK, IDS, IDS.flip(0) % 19 + 1)
FOUR_D = torch.zeros(2, 1, 10, 10, dtype=torch.float64).masked_fill(
    ~MASK[:, None, None], torch.finfo(torch.float64).min
)


@pytest.fixture(params=["sdpa", "eager"], scope="module")
def converted(request):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=request.param,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    convert(model, STLConfig(tile=4, rank=24), example_inputs={"input_ids": IDS, "attention_mask": MASK.long()})
    return model


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)  # a conversion takes a second


def first(output):
    return getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)


PARTS = {
    "encoder": lambda model: model.encoder,
    "layer": lambda model: model.encoder.layer[0],
    "attention": lambda model: model.encoder.layer[1].attention,
    "self": lambda model: model.encoder.layer[1].attention.self,
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("mask", [FOUR_D, FOUR_D[:, 0], {"full_attention": FOUR_D}], ids=["4-D", "3-D", "dict"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_part_called_with_a_mask_that_does_not_say_is_refused(model, name, mask, by_name):
    part, h = PARTS[name](model), model.embeddings(IDS)
    for _ in range(2):  # the first call leaves nothing behind
        with pytest.raises(ShapeError, match="does not say which rows are padding"):
            part(h, attention_mask=mask) if by_name else part(h, mask)
    assert torch.equal(first(model(IDS, attention_mask=MASK.long()))[MASK], first(model(OTHER_IDS, MASK.long()))[MASK])


@pytest.mark.parametrize("name", PARTS)
def test_a_part_called_inside_a_with_follows_it(model, name):
    part, h, other = PARTS[name](model), model.embeddings(IDS), model.embeddings(OTHER_IDS)
    with strassen_tile.padding(model, MASK):
        assert torch.allclose(first(part(h, FOUR_D))[MASK], first(part(other, FOUR_D))[MASK], rtol=0, atol=1e-12)
    assert first(part(h)).shape == h.shape  # nothing is masked, so nothing is refused


def test_the_whole_is_as_the_encoder_alone_inside_a_with(model):
    whole = first(model(IDS, attention_mask=MASK.long()))
    with strassen_tile.padding(model, MASK):
        assert torch.allclose(first(model.encoder(model.embeddings(IDS), FOUR_D))[MASK], whole[MASK])


@pytest.mark.parametrize("reentrant", [False, True])
def test_parts_that_run_again_in_a_backward_pass_are_no_calls_of_their_own(model, reentrant):
    def gradients():
        model.zero_grad()
        first(model(IDS, attention_mask=MASK.long()))[MASK].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert len(again) == len(plain) and all(torch.allclose(p, q) for p, q in zip(plain, again, strict=True))
