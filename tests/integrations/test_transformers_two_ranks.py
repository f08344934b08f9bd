"""If these fail, a lab that trains a converted model on several devices gets another model than on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import strassen_tile as st

hf = pytest.importorskip("transformers")
from tiny_transformers import TEXT, built, outputs  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.mark.slow
def test_fsdp2_and_ddp_train_what_one_process_trains(tmp_path):
    from two_ranks_transformers import IDS, step, trainer

    model = built("llama")
    st.convert(model, st.STLConfig(mixing="none"))
    model.save_pretrained(tmp_path / "stl")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHAO_SKIP_LOADING_SO_FILES": "1",
    }
    script = Path(__file__).with_name("two_ranks_transformers.py")
    done = subprocess.run(
        [sys.executable, *command, script, tmp_path], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["size"] == 2
        assert found["sharded"][1] and found["sharded"][2].startswith("FSDP") and found["local"] == 0.5
        assert found["wrapped"] == "DistributedDataParallel"

    def one():
        return hf.LlamaForCausalLM.from_pretrained(tmp_path / "stl", dtype=torch.float64)

    stepped, trained = one(), one()
    step(stepped, IDS)
    trainer(trained, tmp_path / "run", IDS.repeat(2, 1), 4).train()
    for name, expected in (("fsdp", stepped), ("ddp", trained)):
        again = hf.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        assert isinstance(again.model.layers[1].mlp.down_proj, st.STLLinear)
        for (key, found), wanted in zip(again.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, key=key, name=name: f"{name} {key} {text}"
            )
        assert not torch.allclose(outputs(again, TEXT), outputs(one(), TEXT))
    assert len(list((tmp_path / "fsdp").glob("*.safetensors"))) > 1
