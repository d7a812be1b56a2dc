"""What each rank of a torchrun does; it writes what it saw to the directory that it is given."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

import distnadam
from tests.torch.models import batches, bits, distance, loss_of, make

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
KEPT: list[Any] = []
ours = distnadam.torch


def mine(count: int, seed: int) -> list[torch.Tensor]:
    """This rank's batches."""
    return batches(count * SIZE, seed)[RANK::SIZE]


def train(model: Any, optimizer: Any, count: int, seed: int = 1) -> None:
    for batch in mine(count, seed):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def refused(work: Any) -> str:
    try:
        work()
    except distnadam.errors.DistNadamError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def ordinary(seen: dict[str, Any]) -> None:
    """Train, with what all ranks change alike in between, and what one changes alone."""
    model = make()
    optimizer = ours.DistNadamW(model.named_parameters(), lr=0.01, num_shards=2)
    train(model, optimizer, 5)
    seen["after 5"] = [b.hex() for b in bits(model)]
    model.load_state_dict(make(5).state_dict())
    model[0].weight.data.clamp_(-0.1, 0.1)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    train(model, optimizer, 3, 2)
    if RANK == 0:  # collective on no rank
        seen["steps"] = [float(s["step"]) for s in optimizer.state_dict()["state"].values()]
    seen["after 8"] = [b.hex() for b in bits(model)]
    saved = [p.detach().clone() for p in model.parameters()]
    if RANK == 1:
        with torch.no_grad():
            model[2].bias.add_(1.0)
    seen["one changed"] = refused(lambda: train(model, optimizer, 1, 3))
    with torch.no_grad():
        for p, q in zip(model.parameters(), saved, strict=True):
            p.copy_(q)
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.01 + RANK
    seen["one's rate"] = refused(lambda: train(model, optimizer, 1, 3))
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.01
    state = optimizer.state_dict()
    for each in state["state"].values():
        each["exp_avg"] = each["exp_avg"] * 0.5
    optimizer.load_state_dict(state)
    train(model, optimizer, 2, 4)
    seen["after 10"] = [b.hex() for b in bits(model)]


def unseeded(seen: dict[str, Any]) -> None:
    """Begin with other parameters on each rank."""
    model = make(RANK)
    optimizer = ours.DistNadam(model.named_parameters())
    seen["unseeded"] = refused(lambda: train(model, optimizer, 1))


def scaled(seen: dict[str, Any]) -> None:
    """Overflow on one rank alone."""
    model = make()
    optimizer = ours.DistAdam(model.named_parameters())
    scaler = ours.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    scales = []
    for step, batch in enumerate(mine(6, 1)):
        optimizer.zero_grad()
        loss = loss_of(model, batch) * (torch.inf if (step, RANK) in ((1, 1), (4, 0)) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    seen["scales"] = scales
    seen["scaled"] = [b.hex() for b in bits(model)]
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(loss_of(model, mine(1, 2)[0])).backward()
    seen["torch's scaler"] = refused(lambda: theirs.step(optimizer))
    optimizer.zero_grad()


def absent(seen: dict[str, Any]) -> None:
    """Have gradients on one rank alone, and on none."""
    model = make()
    optimizer = ours.DistNadam(model.named_parameters())
    for batch in mine(3, 1):
        if RANK == 0:
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.step()
    seen["absent"] = [b.hex() for b in bits(model)]
    seen["absent steps"] = [float(s["step"]) for s in optimizer.state.values()]


def rounded(seen: dict[str, Any]) -> None:
    """Have parameters and gradients be rounded on their way, and begin anew from a state_dict."""
    rounding = {"pull_dtype": "bfloat16", "push_dtype": "bfloat16"}
    model = make()
    optimizer = ours.DistNadam(model.named_parameters(), lr=1e-3, num_shards=2, **rounding)
    train(model, optimizer, 4)
    resumed = make(9)
    again = ours.DistNadam(resumed.named_parameters(), lr=1e-3, **rounding)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    train(resumed, again, 4, 2)
    seen["rounded"] = [b.hex() for b in bits(resumed)]
    state = again.state_dict()["state"]
    masters = [state[index]["master"] for index in sorted(state)]
    seen["rounded masters"] = [master.numpy().tobytes().hex() for master in masters]
    seen["dtypes"] = [str(array.dtype) for array in again._held.shards.pull().values()]
    other = make()
    differing = ours.DistNadam(other.named_parameters(), pull_dtype=["bfloat16", None][RANK])
    KEPT.append(differing)  # its shards end with rank 0's, which the other rank may still ask
    if RANK == 1:
        seen["other rounding"] = refused(lambda: train(other, differing, 1))
    else:
        loss_of(other, mine(1, 1)[0]).backward()
        differing._held._build(differing._held.settings(differing.param_groups))


def beside_ddp(seen: dict[str, Any]) -> None:
    """Clip the mean of all ranks, as a script with DDP does; and be wrapped in DDP as well."""
    torch.distributed.init_process_group("gloo")
    one, other = make(), make()
    wrapped = torch.nn.parallel.DistributedDataParallel(other)
    a = ours.DistNadam(one.named_parameters(), lr=0.01)
    b = torch.optim.NAdam(wrapped.parameters(), lr=0.01)
    norms: list[list[float]] = [[], []]
    for step, batch in enumerate(mine(8, 1)):
        for number, (model, optimizer) in enumerate(((one, a), (wrapped, b))):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if step != 5:
                norm = (
                    a.clip_grad_norm_(0.05)
                    if number == 0
                    else torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
                )
            optimizer.step()
            norms[number].append(norm.item())
    seen["clipped"] = distance(one, other)
    seen["norms"] = norms
    inner = make()
    twice = torch.nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=True)
    c = ours.DistNadam(twice.named_parameters(), lr=0.01)
    seen["wrapped"] = refused(lambda: train(twice, c, 1))
    c.zero_grad()
    inner = make()
    once = torch.nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=True)
    once.register_comm_hook(None, noop_hook)
    d, plain = ours.DistNadam(once.named_parameters(), lr=0.01), make()
    train(once, d, 6)
    train(plain, ours.DistNadam(plain.named_parameters(), lr=0.01), 6)
    seen["no all-reduce"] = bits(inner) == bits(plain)
    torch.distributed.destroy_process_group()


def main(directory: Path) -> None:
    seen: dict[str, Any] = {}
    for part in (ordinary, unseeded, scaled, absent, rounded, beside_ddp):
        part(seen)
        print(RANK, part.__name__, flush=True)
    (directory / f"{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
