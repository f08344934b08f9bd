"""What two processes do with a loaded model, run by torchrun; test_transformers_two_ranks.py reads what they leave."""

import json
import sys
from pathlib import Path

import torch
import transformers as hf
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import strassen_tile as st

IDS = torch.randint(1, 60, (4, 9), generator=torch.Generator().manual_seed(3))


def step(model, ids):
    """One step of SGD on these texts, without momentum: the change is the gradient."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.zero_grad()
    model.eval()


def trainer(model, folder, ids, batch):
    arguments = hf.TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=2, learning_rate=0.1, optim="sgd", max_grad_norm=0.5,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    return hf.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = {"size": distributed.get_world_size()}
    model = hf.LlamaForCausalLM.from_pretrained(
        folder / "stl", distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float64
    )
    layer = model.model.layers[0].mlp.up_proj
    found["sharded"] = [
        type(layer).__mro__[1].__name__,
        isinstance(layer.encoded_weight, DTensor),
        type(model).__name__,
    ]
    found["local"] = layer.encoded_weight.to_local().numel() / layer.encoded_weight.numel()
    step(model, IDS.chunk(2)[rank])
    model.save_pretrained(folder / "fsdp", max_shard_size="20KB")

    plain = hf.LlamaForCausalLM.from_pretrained(folder / "stl", dtype=torch.float64)
    run = trainer(plain, folder / "run", IDS.repeat(2, 1), 2)
    wrapped = []
    run.add_callback(
        type("See", (hf.TrainerCallback,), {"on_step_end": lambda *_, **__: wrapped.append(type(run.model_wrapped))})
    )
    run.train()
    found["wrapped"] = wrapped[0].__name__
    if rank == 0:
        plain.save_pretrained(folder / "ddp")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    assert st.STLLinear
    main(Path(sys.argv[1]))
