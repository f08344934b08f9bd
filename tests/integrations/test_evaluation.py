"""If these fail, lm-evaluation-harness cannot read the folder of a converted model, or measures another one."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import strassen_tile as st

pytestmark = pytest.mark.slow
TEXTS = ["the cat sat on the mat", "a dog barked at the cat", "the mat was red"]


def run(*command):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_who_asks_for_the_config_ahead_of_models_is_answered():
    kinds = [{"layer": "STLLinear", "rank": 24}]
    written = {"quant_method": "stl", "format": 1, "version": "0", "kinds": kinds, "layers": {"0": 0}}
    said = run(
        "-c",
        f"""
import strassen_tile
from transformers.quantizers import AutoQuantizationConfig
print(type(AutoQuantizationConfig.from_dict({written!r})).__name__)
""",
    )
    assert said.strip() == "STLQuantConfig"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("converted")
    words = ["<eos>", *sorted({word for text in TEXTS for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>").save_pretrained(where)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes, vocab_size=len(words), bos_token_id=None, eos_token_id=0)
    ).eval()
    st.convert(model, st.STLConfig(tile=(1, 4, 4), rank=6, mixing="none", init="fit"))
    model.save_pretrained(where)
    return where


@pytest.fixture
def task(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "local.yaml").write_text(f"""
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    return tmp_path


def test_through_python_and_the_command_line_it_is_the_models_loss(folder, task):
    pytest.importorskip("lm_eval")
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    assert sum(isinstance(module, st.STLLinear) for module in model.modules()) == 14
    nats = 0.0
    for text in TEXTS:  # each token from those before it, the first from the one that ends texts
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model.double()(ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    said = run(
        "-c",
        f"""
import strassen_tile
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
found = simple_evaluate(model="hf", model_args={{"pretrained": {str(folder)!r}, "dtype": "float32"}}, tasks=["local"],
    task_manager=TaskManager(include_path={str(task)!r}), device="cpu", batch_size=2)
print("bits", found["results"]["local"]["bits_per_byte,none"])
""",
    )
    assert float(re.search(r"^bits (.*)$", said, re.M)[1]) == pytest.approx(expected, rel=1e-5)
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "local"]
    arguments += ["--include_path", str(task), "--device", "cpu", "--batch_size", "2"]
    table = run("-m", "strassen_tile.integrations.evaluation", *arguments)
    assert f"{expected:.4f}" in table
