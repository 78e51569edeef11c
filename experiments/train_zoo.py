"""Train zoo.trained_induction and zoo.modular_addition, which interp ships.

Run: python experiments/train_zoo.py induction|addition [FOLDER]. Training is seeded and takes a few minutes on two
cores for each model. Writes NAME.safetensors and NAME.json (configuration, checksum, measurements) into FOLDER
(default: interp/zoo/weights). On another processor or version of torch, rounding differs, and so do the weights in
detail.

Result: `trained_induction` has a loss of 0.15 nats a token on repetitions and two induction heads; `modular_addition`
is right on all 2,809 sums.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model

from interp import zoo
from interp.zoo import shipped, trained
from interp.zoo.tokenizer import SPECIALS

N_CTX, BATCH, STEPS = 64, 64, 4000


def build(config: dict[str, Any]) -> NativeModel:
    """Build a model with random weights."""
    cfg = TransformerBridgeConfig.from_dict(config)
    model = NativeModel(cfg)
    initialize_native_model(model, cfg)
    return model


def induction() -> tuple[NativeModel, dict[str, Any]]:
    """Train on repeated random segments and on texts of a fixed successor table."""
    n = len(trained.INDUCTION_WORDS)
    config = {
        "d_model": 64, "d_head": 16, "n_heads": 4, "n_layers": 2, "n_ctx": N_CTX, "d_vocab": len(SPECIALS) + n,
        "attn_only": True, "normalization_type": "LN", "positional_embedding_type": "standard", "seed": 0,
    }  # fmt: skip
    model, draw = build(config), torch.Generator().manual_seed(0)
    successors = torch.randint(n, (n, 4), generator=draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        repeated = repeated_words(BATCH // 2, n, draw)
        ids = prepend_bos(torch.cat([repeated, successor_texts(BATCH // 2, successors, draw)]))
        loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer_step(loss, model, optimizer)
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss:.3f}", flush=True)
    return model, config


def repeated_words(rows: int, n: int, draw: Tensor | Any) -> Tensor:
    """Return random words [rows, n_ctx − 1] that repeat.

    Each row has its own period of 5 to 30 words.
    """
    words = torch.randint(n, (rows, N_CTX - 1), generator=draw)
    periods = torch.randint(5, 31, (rows, 1), generator=draw)
    return words.gather(1, torch.arange(N_CTX - 1)[None] % periods)


def successor_texts(rows: int, successors: Tensor, draw: Any) -> Tensor:
    """Return words [rows, n_ctx − 1].

    Each word is one of four successors of the previous word.
    """
    ids = [torch.randint(len(successors), (rows,), generator=draw)]
    for _ in range(N_CTX - 2):
        ids.append(successors[ids[-1], torch.randint(4, (rows,), generator=draw)])
    return torch.stack(ids, 1)


def prepend_bos(words: Tensor) -> Tensor:
    """Return token ids [rows, n_ctx] that start with <bos>."""
    return torch.cat([torch.zeros(len(words), 1, dtype=torch.long), words + len(SPECIALS)], 1)


def addition() -> tuple[NativeModel, dict[str, Any]]:
    """Train on (a + b) mod p as Nanda et al. (2023), but smaller.

    Batches are all of the training half of the table; weight decay is strong.
    """
    p = trained.MODULUS
    config = {
        "d_model": 64, "d_head": 16, "n_heads": 4, "n_layers": 1, "d_mlp": 256, "act_fn": "relu", "n_ctx": 8,
        "d_vocab": len(SPECIALS) + p + 1, "normalization_type": None, "positional_embedding_type": "standard",
        "seed": 0,
    }  # fmt: skip
    model = build(config)
    ids, targets = trained.table()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    train, test = order[: int(0.5 * len(ids))], order[int(0.7 * len(ids)) :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=2.0, betas=(0.9, 0.98))
    for step in range(10_000):
        loss = cross_entropy(model(ids[train])[:, -1].double(), targets[train])
        optimizer_step(loss, model, optimizer)
        if step % 200 == 199:
            with torch.no_grad():
                logits = model(ids[test])[:, -1].double()
            held_out = cross_entropy(logits, targets[test]).item()
            accuracy = (logits.argmax(1) == targets[test]).double().mean().item()
            print(f"step {step + 1}: train {loss:.2e}, held out {held_out:.2e}, accuracy {accuracy:.3f}", flush=True)
            if accuracy == 1 and held_out < 0.01:
                break
    return model, config


def optimizer_step(loss: Tensor, model: NativeModel, optimizer: torch.optim.Optimizer) -> None:
    """Take one optimizer step."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main(name: str, folder: Path) -> None:
    """Train, save, load as a user does, and measure."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, config = {"induction": induction, "addition": addition}[name]()
    name = {"induction": "trained_induction", "addition": "modular_addition"}[name]
    path = folder / f"{name}.safetensors"
    weights = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, path)
    made = {"seconds": round(time.perf_counter() - start), "torch": torch.__version__}
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"sha256": checksum, "config": config, "made": made, "measured": {}}
    write(folder / f"{name}.json", about)
    about["measured"] = getattr(zoo, name)(folder=folder).measure()
    write(folder / f"{name}.json", about)
    print(json.dumps(about["measured"], indent=1))


def write(path: Path, about: dict[str, Any]) -> None:
    """Write the configuration and measurements as JSON."""
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else shipped.WEIGHTS)
