"""Small models, each named once: plain PyTorch ones, and transformers' architectures with random weights."""

import torch
from torch import nn

from strassen_tile import STLConfig

VOCABULARY = 101  # odd: tokens changed carelessly fall outside
SEQUENCE = STLConfig(tile=4, rank=8)
CAUSAL = STLConfig(tile=4, rank=8, mixing="causal")
APART = STLConfig(tile=4, rank=8, mixing="none")
IDS = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
IDS[0, 2] = VOCABULARY - 1
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])


class Classifier(nn.Module):
    """(B, N, 8) → (B, 3), with attention between rows, a layer that is not called, and a head under a plain name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8, bias=False)
        self.unused = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.pooled = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        y = self.second(self.first(x).relu())
        y = self.norm(x + (y @ y.mT).softmax(dim=-1) @ y)
        return self.last(self.pooled(y.mean(dim=1)).relu())


class Tokens(nn.Module):
    """(B, N) tokens → (B, N, vocabulary), attention backwards only or both ways; names say nothing of it."""

    def __init__(self, backwards_only):
        super().__init__()
        self.backwards_only = backwards_only
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.words = nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        y = self.inner(x)
        scores = y @ y.mT
        if self.backwards_only:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return self.words(self.outer(scores.softmax(dim=-1) @ y).relu())


def bert(kind="BertForSequenceClassification", **options):
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        **options,
    )
    return getattr(hf, kind)(config).double().eval()


def llama(kind="LlamaForCausalLM"):
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
    )
    return getattr(hf, kind)(config).double().eval()


def gpt2():
    import transformers as hf

    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)).double().eval()


def t5():
    import transformers as hf

    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config).double().eval()


def distilbert():
    import transformers as hf

    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32
    )
    return hf.DistilBertForSequenceClassification(config).double().eval()


def vit():
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=2
    )
    return hf.ViTForImageClassification(config).double().eval()
