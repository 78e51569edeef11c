"""Component reuse: heads of one task, told where to look, repair another task.

Run: python experiments/row_repair.py [--json experiments/results/row_repair.json] [--steps 1000] [--prompts 256]

Claim (Merullo et al. 2024, arXiv 2310.08744): GPT-2 Medium answers colored objects with one of the three colors, and
often the wrong one (49.6%). Four heads that in indirect object identification (IOI) suppress the repeated name hardly
act there. If their attention rows at the last token are overwritten with 1/m on the m wrong colors, accuracy rises to
93.7%: the two tasks can use the same components.

The model here is trained by this script, in about a minute: a GPT-2 of 3 layers and 4 heads on words, on both tasks at
once. Names and colors come from the same 24 words, so that what a head does to a name is defined for a color too.

    IOI:             w3 and w7 met , w3 gave to → w7
    colored objects: the w1 o4 , w9 o2 , w5 o8 , what of o2 is → w9

After 1,000 steps it answers 96% of IOI, and colored objects with one of the three colors, about at random (38%). Heads
are ranked on IOI alone, by the rise of the logit difference if the row at the last token is overwritten with 1/2 on the
two tokens of the repeated name (`interp.edit`): the highest would suppress what they read, the lowest copy it. Rows of
the four highest and of the four lowest are then overwritten on colored objects.

Result (results/row_repair.json, 256 prompts): the repair of the paper does not appear, since this model has no
suppressing head: the rise is negative for all 12 heads, and the four highest on the wrong colors lower accuracy from
0.38 to 0.20. What reading can repair is repaired by copying: the four lowest, on the right color, answer 0.98.

Null: four heads drawn at random answer 0.81 to 0.98 on the right color (ten draws), so that copying is no property of
the four, and 0.07 to 0.22 on the wrong colors. The four lowest on the two wrong objects answer 0.19. The right color is
given to the edit, as the wrong ones are in the paper: the numbers say what heads can do with it, not that they find it.
The arm on the right color was added after a first run had shown that the repair of the paper does not appear.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from resource_meter import ResourceMeter
from study_record import study_parser, study_record, write_record
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from interp.zoo.tokenizer import word_tokenizer

NAMES, OBJECTS = [f"w{i}" for i in range(24)], [f"o{i}" for i in range(12)]
WORDS = [*NAMES, *OBJECTS, "and", "met", ",", "gave", "to", "the", "what", "of", "is"]
N_HEADS, N_LAYERS, CHOSEN = 4, 3, 4
Head = tuple[int, int]
Draw = Callable[[random.Random], interp.PromptPair]


def spans_of(words: Sequence[str], places: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return the characters of the words at ``places``."""
    starts = np.cumsum([0, *(len(w) + 1 for w in words)])
    return {name: (int(starts[i]), int(starts[i]) + len(words[i])) for name, i in places.items()}


def indirect_object(rng: random.Random) -> interp.PromptPair:
    """Draw a pair of IOI; in the corrupt prompt the other name is repeated."""
    names = rng.sample(NAMES, 2)
    i = rng.randrange(2)
    words = [names[0], "and", names[1], "met", ",", names[i], "gave", "to"]
    spans = spans_of(words, {"first": 2 * i, "second": 5})
    corrupt = " ".join([*words[:5], names[1 - i], *words[6:]])
    return interp.PromptPair(" ".join(words), corrupt, f" {names[1 - i]}", f" {names[i]}", spans)


def colored_objects(rng: random.Random) -> interp.PromptPair:
    """Draw a pair of colored objects; the corrupt prompt asks for another object."""
    colors, objects, (i, j, k) = rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), rng.sample(range(3), 3)
    words = " , ".join(
        f"the {c} {o}" if n == 0 else f"{c} {o}" for n, (c, o) in enumerate(zip(colors, objects, strict=True))
    )
    clean = [*words.split(), ",", "what", "of", objects[i], "is"]
    place = [1, 4, 7]
    spans = spans_of(clean, {"right": place[i], "wrong": place[j], "other wrong": place[k],
                             "wrong object": place[j] + 1, "other wrong object": place[k] + 1})  # fmt: skip
    corrupt = " ".join([*clean[:-2], objects[j], "is"])
    return interp.PromptPair(" ".join(clean), corrupt, f" {colors[i]}", f" {colors[j]}", spans)


def trained_model(steps: int, seed: int = 0) -> interp.Model:
    """Train on both tasks, IOI with more weight, and load the model."""
    tokenizer, rng = word_tokenizer(WORDS), random.Random(seed)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=24, n_embd=64, n_layer=N_LAYERS, n_head=N_HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        total = torch.zeros(())
        for draw, weight in ((indirect_object, 1.0), (colored_objects, 0.3)):
            pairs = [draw(rng) for _ in range(64)]
            ids = torch.tensor(tokenizer([p.clean for p in pairs])["input_ids"])
            answers = torch.tensor(tokenizer.convert_tokens_to_ids([str(p.answer).strip() for p in pairs]))
            total = total + weight * cross_entropy(model(ids).logits[:, -1], answers)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {total:.3f}", flush=True)
    return interp.load(model, tokenizer=tokenizer)


def on(keys: Sequence[str], heads: Sequence[Head] | None = None) -> interp.AttentionEdit:
    """Overwrite rows at the last token with equal weights on ``keys`` and 0 elsewhere."""
    return interp.AttentionEdit(queries=-1, heads=heads, weights=dict.fromkeys(keys, 1 / len(keys)))


def suppression(model: interp.Model, pairs: Sequence[interp.PromptPair]) -> dict[Head, float]:
    """Return by how much each head's row on the repeated name raises the logit difference of IOI."""
    effects = interp.edit(model, pairs, {"on it": on(["first", "second"])}, each="head", show_progress=False)
    means: Any = effects.frame().groupby(["layer", "head"])["raw"].mean()
    return {(int(layer), int(head)): float(rise) for (layer, head), rise in means.items()}


def accuracies(
    model: interp.Model, pairs: Sequence[interp.PromptPair], edits: dict[str, interp.AttentionEdit]
) -> dict[str, float]:
    """Return the share of prompts whose first token is right, without edits and with each of them."""
    frame: Any = interp.edit(model, pairs, edits, metric=interp.rank, show_progress=False).frame()
    frame["is_right"] = frame["clean"] + frame["raw"] == 0  # tokens above the answer
    unedited = float((frame.drop_duplicates("example")["clean"] == 0).mean())
    return {"unedited": unedited, **frame.groupby("component")["is_right"].mean().to_dict()}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, choose heads on IOI, overwrite their rows on colored objects, print and write the accuracies."""
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="updates of the training")
    parser.add_argument("--prompts", type=int, default=256, help="prompts of each task")
    parser.add_argument("--draws", type=int, default=10, help="random sets of other heads")
    options = parser.parse_args(arguments)
    with ResourceMeter() as meter:
        model, rng = trained_model(options.steps), random.Random("fresh prompts")
        first, second = ([draw(rng) for _ in range(options.prompts)] for draw in (indirect_object, colored_objects))
        rises = suppression(model, first)
        order = sorted(rises, key=lambda head: -rises[head])
        wrong, right, objects = ["wrong", "other wrong"], ["right"], ["wrong object", "other wrong object"]
        high, low = order[:CHOSEN], order[-CHOSEN:]
        edits = {
            "highest four on wrong colors": on(wrong, high), "highest four on the right color": on(right, high),
            "lowest four on wrong colors": on(wrong, low), "lowest four on the right color": on(right, low),
            "lowest four on wrong objects": on(objects, low),
        }  # fmt: skip
        for i in range(options.draws):
            heads = rng.sample(order, CHOSEN)
            edits |= {
                f"random {i} on wrong colors": on(wrong, heads),
                f"random {i} on the right color": on(right, heads),
            }
        colors = accuracies(model, second, edits)
        repeated = accuracies(model, first, {"highest four on the repeated name": on(["first", "second"], high)})
    numbers = {
        "steps": options.steps, "prompts": options.prompts,
        "rise_of_logit_difference": {f"L{layer}H{head}": rises[layer, head] for layer, head in order},
        "colored_objects": colors, "ioi": repeated,
    }  # fmt: skip
    print(json.dumps(numbers, indent=1))
    return write_record(study_record(model, meter, numbers), options.json)


if __name__ == "__main__":
    main()
