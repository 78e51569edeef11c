"""`interp demo`: every main method on one model, and one page of results.

It checks the behaviour, collects attention, patches, ablates and traces.

Every step's result is on disk before the next step begins, so that an interrupted run keeps what it finished.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InterpError, TaskError
from interp.results.effects import Effects

if TYPE_CHECKING:
    from interp.model.model import Model

HEADS = "patch every head's output, layer × head (denoise)"
STRONGEST, OTHERS = 10, 10  # heads that every method is applied to: those with the largest effect, and random others
SHOWN = 2  # pairs whose attention patterns are on the page
Say = Callable[[str], None]


@dataclass(frozen=True)
class CausalStep:
    """One causal experiment of the demo.

    ``file``: the name of its result without ending. ``run``: the call that runs it.
    """

    title: str
    file: str
    run: Callable[[], Effects]


@dataclass
class Demo:
    """What to run, and where to write it; `run` returns the path of the page."""

    task: str = "ioi"
    n: int = 64
    seed: int = 0
    out: Path = Path("results/demo")
    model: str = "smollm2"
    trace_facts: int = 3
    samples: int = 10
    say: Say = print
    finished: list[Path] = field(default_factory=list)
    results: dict[str, Effects] = field(default_factory=dict)

    def check(self) -> None:
        """Raise InterpError for bad options or an unwritable folder, before any work."""
        from interp.tasks import task

        task(self.task)
        if self.n < 2:
            raise InterpError(f"--n must be at least 2 (one example has no interval), got {self.n}")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            raise InterpError(
                f"cannot write to {self.out} ({error.strerror or error}): choose another folder with --out"
            ) from None

    def run(self) -> Path:
        """Run every step.

        Raises InterpError (without leaving partial files) if something is wrong with the input.
        """
        from interp.model.load_model import load
        from interp.plots.report import report

        self.check()
        start = time.perf_counter()
        with self.step("load the model"):
            model = load(self.model)
            self.say(f"      {model!r}")
        with self.step("check that the model does the task"):
            pairs, behaviour = self.pairs(model)
            self.say(f"      {behaviour}")
        with self.step("collect every head's attention statistics on the clean prompts"):
            from headstats import StatSpec

            stats = model.attention_stats(pairs, StatSpec(previous=True, diagonal=True, received=True))
            self.finished.append(stats.write(self.out / "attention_stats.parquet"))
            self.say(f"      attention computed by: {', '.join(sorted(set(stats.backends.values())))}")
        for step in self.causal_steps(model, pairs):
            with self.step(step.title):
                self.results[step.title] = step.run()
                self.finished.append(self.results[step.title].write(self.out / f"{step.file}.parquet"))
        with self.step(f"collect every head's attention patterns on {min(SHOWN, len(pairs))} pairs"):
            patterns = model.attention_patterns(pairs[:SHOWN])
            self.finished.append(patterns.write(self.out / "attention_patterns.parquet"))
        with self.step("write the page"):
            page = report(
                {**self.results, "attention": stats, "patterns": patterns},
                title=f"{self.task} on {model.name}",
                notes=f"{behaviour}. Made by: interp demo --task {self.task} --n {self.n} --seed {self.seed}",
            )
            path = page.write(self.out / "report.html")
            self.finished.append(path)
        self.summarise(time.perf_counter() - start)
        return path

    def pairs(self, model: Model) -> tuple[Any, Any]:
        """Return the task's pairs and the model's behaviour on them.

        TaskError if the model does not do the task.
        """
        from interp import tasks

        pairs = tasks.task(self.task)(model, self.n, self.seed)
        behaviour = tasks.check(model, pairs)
        behaviour.require()
        return pairs, behaviour

    def causal_steps(self, model: Model, pairs: Any) -> Iterator[CausalStep]:
        """Yield the causal steps.

        Those after the first patching of heads depend on its result.
        """
        from interp.recipes.ablation import ablate
        from interp.recipes.patching import patch

        for mode in ("denoise", "noise"):
            yield CausalStep(
                f"patch the residual stream, layer × position ({mode})",
                f"patch_resid_pre_{mode}",
                partial(patch, model, pairs, model.sites("resid_pre"), mode=mode),
            )
        yield CausalStep(HEADS, "patch_z_denoise", partial(patch, model, pairs, model.sites("z")))
        heads = self.select_heads(model)
        which = f"the {min(STRONGEST, len(heads))} heads of most effect and {max(0, len(heads) - STRONGEST)} others"
        yield CausalStep(f"patch {which} (noise)", "patch_z_noise", partial(patch, model, pairs, heads, mode="noise"))
        for using in ("zero", "mean", "resample"):
            yield CausalStep(
                f"ablate {which} ({using})",
                f"ablate_z_{using}",
                partial(ablate, model, pairs, heads, using=using, seed=self.seed),
            )
        yield from self.traces(model)

    def select_heads(self, model: Model) -> list[Any]:
        """Return the heads with the largest effects, and random others for comparison.

        Effects of either sign count.
        """
        frame = self.results[HEADS].frame()
        size = {head: abs(rows["effect"].mean()) for head, rows in frame.groupby(["layer", "head"])}
        sites = sorted(model.sites("z"), key=lambda site: -size[site.layer, site.head])
        others = sites[STRONGEST:]
        return sites[:STRONGEST] + random.Random(self.seed).sample(others, min(OTHERS, len(others)))

    def traces(self, model: Model) -> Iterator[CausalStep]:
        """Yield causal tracing of facts that the model knows.

        If it knows too few, yield nothing and say so.
        """
        from interp import tasks
        from interp.recipes.tracing import Component, trace

        try:
            facts = tasks.facts(model, n=self.trace_facts, seed=self.seed)
        except TaskError as error:
            self.say(f"  –   causal tracing is left out: {error}")
            return
        windows: dict[Component, int] = {"resid_post": 1, "mlp_out": 10, "attn_out": 10}
        for component, window in windows.items():
            yield CausalStep(
                f"trace {len(facts)} facts, restoring {component}" + (f" in windows of {window}" if window > 1 else ""),
                f"trace_{component}",
                partial(trace, model, facts, component, samples=self.samples, seed=self.seed),
            )

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Report what runs, and how long it took."""
        self.say(f"  ▸   {title}")
        start = time.perf_counter()
        yield
        self.say(f"      {time.perf_counter() - start:.1f} s")

    def summarise(self, seconds: float) -> None:
        """Report the strongest heads, and where the files are."""
        self.say(f"\nStrongest heads when patched from clean into corrupt (n = {self.n}):")
        for row in self.results[HEADS].summary().head(5).to_dict("records"):
            self.say(f"  L{row['layer']}H{row['head']}  {row['effect']:+.2f}  [{row['lo']:+.2f}, {row['hi']:+.2f}]")
        self.say(f"\nDone in {seconds:.0f} s. Results:")
        for path in self.finished:
            self.say(f"  {os.path.relpath(path)}")
