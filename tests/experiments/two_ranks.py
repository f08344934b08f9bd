"""What two processes do together, run by torchrun; test_compare_devices.py reads what they leave in the folder given."""

import json
import sys
from pathlib import Path

import torch
from small_runs import exact_network, network, norms_kept, rates_kept, splits, spoilt_at, train

from strassen_tile.errors import DivergedError
from strassen_tile.integrations.ranks import RankError, first, ranks


def fail() -> None:
    raise OSError("no space")


def main(folder: Path) -> None:
    world = ranks()
    found: dict[str, object] = {"size": world.num_processes, "records": []}
    for name, limit in (("ragged", 67), ("one left", 65)):
        model, data = network(), splits(limit)
        with rates_kept() as found[f"{name} rates"]:
            found["records"].append(train(model, data, folder / name))
        if world.is_main_process:
            torch.save(model.state_dict(), folder / f"{name}.pt")
        # Goes on from the checkpoint that the first process finds, whatever this one would have found.
        again = network()
        there = folder / name if world.is_main_process else folder / "nowhere"
        later = train(again, data, there, recorded=1)
        found[f"{name} resumed"] = [record["epoch"] for record in later]
        state = model.state_dict()
        found[f"{name} equal"] = all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    for optimizer, lr in (("adamw", 3e-3), ("sgd", 0.1)):
        model = exact_network()
        with norms_kept() as found[f"{optimizer} norms"]:
            train(model, splits(65), folder / optimizer, optimizer=optimizer, lr=lr)
        if world.is_main_process:
            torch.save(model.state_dict(), folder / f"{optimizer}.pt")
    # Only one process has the loss that is not finite.
    model = spoilt_at(6, float("nan"))[0] if world.process_index else network()
    try:
        train(model, splits(64), folder / "diverged", epochs=3)
    except DivergedError as error:
        found["diverged"] = [error.epoch, error.step, str(error)]
    found["told"] = first(lambda: ["from", world.process_index])
    try:
        first(fail)
    except (OSError, RankError) as error:
        found["failed"] = [type(error).__name__, str(error)]
    draws = []
    train(
        network(),
        splits(16),
        folder / "draws",
        seed=7,
        epochs=1,
        on_step=lambda *_: draws.append(float(torch.rand(()))),
    )
    found["draw"] = draws[0]
    found["no space"] = (
        full_in(world.process_index == 0, folder / "full 0"),
        full_in(world.process_index == 1, folder / "full 1"),
    )
    (folder / f"rank{world.process_index}.json").write_text(json.dumps(found))
    world.destroy_process_group()


def full_in(here: bool, folder: Path) -> list[str]:
    """What the processes say when one of them cannot write its part of a checkpoint."""
    save = torch.save

    def full(state: object, path: str) -> None:
        if here and path.endswith((".pth", "optimizer.pt")):
            raise RuntimeError("unexpected pos 64 vs 0\nand where in the source")
        save(state, path)

    torch.save = full
    try:
        train(network(), splits(16), folder)
    except (OSError, RankError) as error:
        return [type(error).__name__, str(error)]
    finally:
        torch.save = save
    return []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
