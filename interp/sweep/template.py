"""The sweep.toml that `interp sweep init` writes: every key, explained."""

from __future__ import annotations

from interp.metrics import METRICS
from interp.recipes.registry import RECIPES

_TEMPLATE = """\
# A sweep: models × tasks × recipes × sites × seeds.
#   interp sweep plan sweep.toml     what it costs, before anything runs
#   interp sweep run sweep.toml      run it; whatever stops it, the same command goes on where it was
version = 1
name = "ioi-heads"            # of the run, and of its folder: runs/ioi-heads
seeds = [0]                   # prompts, donors and noise follow from these
examples_per_part = 8         # examples computed and stored together: what is lost, at most, when something dies
# engine = "auto"             # auto, fast, or naive (one full forward per cell: the oracle)
# memory = "4GiB"             # memory of a worker besides the model's weights

[[models]]
load = "smollm2"              # embedded; or a hub id, a local folder, a .gguf file
# name = "smollm2"            # how results call it
# dtype = "float32"           # float32, float64, bfloat16, float16
# bos = true                  # a BOS token in front of every text; false: none; "tokenizer": what it adds itself
# device = "cuda:0"           # or device_map = "auto" for a model larger than one GPU

[[tasks]]
task = "ioi"                  # a task of interp.tasks
n = 32                        # prompts
# require = 0.8               # accuracy below which a model's parts are marked as failed, in place of being measured;
#                             # asked of 32 prompts, and of all where these leave it open
# options = { corruption = "abc" }

# [[tasks]]
# pairs = "mine.csv"          # or prompts of your own: .csv or .jsonl with clean, corrupt, answer, foil

[[recipes]]
recipe = "patch"              # {recipes}
mode = "denoise"              # each recipe has the options that its command has: interp patch --help
metric = "logit_diff"         # {metrics}

[[recipes]]
recipe = "ablate"
using = "mean"
# tasks = ["ioi"]             # a recipe runs on all tasks and sites, unless it names some

[[sites]]
name = "heads"
sites = "z"                   # z: every head; resid_pre: layer × position; mlp_out@-1; z.L9H6,z.L10H0
# layers = "0-5,9"       # or a list: [0, 1, 9]

# [[sites]]
# name = "movers"
# groups = { movers = "z.L9H6,z.L10H0" }   # changed together
"""


def sweep_template() -> str:
    """Return the text of the template, with the recipes and metrics that there are."""
    return _TEMPLATE.replace("{recipes}", ", ".join(RECIPES)).replace("{metrics}", ", ".join(METRICS))
