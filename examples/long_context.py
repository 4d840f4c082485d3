"""Long context: the tokens of a packed row over two processes (`sequence_parallel`), with the loss of one.

python examples/long_context.py [MODEL_FOLDER] [NAME]

In a script of your own, torchrun starts the processes and sets the address.
"""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
from small import arguments, documents
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer

import axattn

RANKS = 2


def loss_and_gradient(folder: str, name: str, rank: int, port: int) -> tuple[float, float]:
    """The loss of one batch and the norm of its gradients, on this rank of `RANKS`; on the only one if `port` is 0."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = axattn.prepare_for_training(axattn.from_pretrained(folder, attn_implementation=name)).train()
    collator = axattn.PackingCollator(2048, pad_token_id=tokenizer.pad_token_id)
    batch = collator([{"input_ids": tokenizer(text)["input_ids"]} for text in documents()[:16]])
    if port:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("sp",))
        axattn.sequence_parallel(model, mesh["sp"])
    loss = model(**batch).loss
    loss.backward()
    if port:
        axattn.parallel.average_gradients(model, mesh["sp"])
        dist.destroy_process_group()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    return float(loss.detach()), float(norm)


def work(rank: int, folder: str, name: str, port: int, found: torch.Tensor) -> None:
    """One process."""
    torch.set_num_threads(1)
    found[rank] = torch.tensor(loss_and_gradient(folder, name, rank, port))


def main(folder: str, name: str = "auto") -> float:
    """The loss over the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = torch.zeros(RANKS, 2).share_memory_()
    torch.multiprocessing.start_processes(work, (folder, name, port, found), nprocs=RANKS, start_method="fork")
    one = torch.tensor(loss_and_gradient(folder, name, 0, 0))
    for rank, (loss, norm) in enumerate(found.tolist()):
        print(f"rank {rank}: loss {loss:.4f}, gradient {norm:.4f}")
    print(f"one process: loss {one[0]:.4f}, gradient {one[1]:.4f}")
    torch.testing.assert_close(found, one.expand(RANKS, 2), rtol=1e-4, atol=1e-5)
    return float(found[0, 0])


if __name__ == "__main__":
    main(*arguments(__doc__))
