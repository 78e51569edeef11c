"""The main job, end to end: check the behaviour, read attention, patch, ablate, trace, write one page.

`interp demo` runs it; every step's result is on disk before the next begins, so that an interrupted run
leaves what it finished.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import InterpError, TaskError
from interp.results.effects import Effects

HEADS = "patch every head's output, layer × head (denoise)"
STRONGEST, OTHERS = 10, 10  # heads that are looked at in every way: those with most effect, and as many drawn by lot
SHOWN = 2  # pairs whose attention patterns go into the page
Say = Callable[[str], None]


@dataclass
class Demo:
    """What to run and where to put it; `run` does it and returns the page's path."""

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
        """Refuse bad options and an unwritable folder before any work."""
        from interp.tasks import task

        task(self.task)
        if self.n < 2:
            raise InterpError(f"--n must be at least 2 (intervals need examples to resample), got {self.n}")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            raise InterpError(
                f"cannot write to {self.out} ({error.strerror or error}): choose another folder with --out"
            ) from None

    def run(self) -> Path:
        """Run every step. Raises InterpError (with nothing half-written) if something is wrong with the input."""
        import interp

        self.check()
        started = time.perf_counter()
        with self.step("load the model"):
            model = interp.load(self.model)
            self.say(f"      {model!r}")
        with self.step("check that the model does the task"):
            pairs, behaviour = self.pairs(model)
            self.say(f"      {behaviour}")
        with self.step("read every head's attention on the clean prompts"):
            from headstats import StatSpec

            stats = model.attention_stats(pairs, StatSpec(previous=True, diagonal=True, received=True))
            self.keep(stats.write(self.out / "attention_stats.parquet"))
            self.say(f"      attention computed by: {', '.join(sorted(set(stats.backends.values())))}")
        for title, name, job in self.jobs(interp, model, pairs):
            with self.step(title):
                self.results[title] = job()
                self.keep(self.results[title].write(self.out / f"{name}.parquet"))
        with self.step(f"keep what every head reads on {min(SHOWN, len(pairs))} pairs"):
            patterns = model.attention_patterns(pairs[:SHOWN])
            self.keep(patterns.write(self.out / "attention_patterns.parquet"))
        with self.step("write the page"):
            notes = f"{behaviour}. Made by: interp demo --task {self.task} --n {self.n} --seed {self.seed}"
            page = interp.report(
                {**self.results, "attention": stats, "patterns": patterns},
                title=f"{self.task} on {model.name}",
                notes=notes,
            )
            path = page.write(self.out / "report.html")
            self.keep(path)
        self.summarise(time.perf_counter() - started)
        return path

    def pairs(self, model: Any) -> tuple[Any, Any]:
        """The task's pairs and the model's behaviour on them; TaskError if the model does not do the task."""
        from interp import tasks

        pairs = tasks.task(self.task)(model, self.n, self.seed)
        behaviour = tasks.check(model, pairs)
        behaviour.require()
        return pairs, behaviour

    def jobs(self, interp: Any, model: Any, pairs: Any) -> Iterator[tuple[str, str, Callable[[], Effects]]]:
        """(title, file name, what to run) of every causal step."""
        for mode in ("denoise", "noise"):
            yield (
                f"patch the residual stream, layer × position ({mode})",
                f"patch_resid_pre_{mode}",
                lambda mode=mode: interp.patch(model, pairs, model.sites("resid_pre"), mode=mode),
            )
        yield HEADS, "patch_z_denoise", lambda: interp.patch(model, pairs, model.sites("z"))
        heads = self.chosen(model)  # read only once the step before is done
        which = f"the {min(STRONGEST, len(heads))} heads of most effect and {max(0, len(heads) - STRONGEST)} others"
        yield (
            f"patch {which} (noise)",
            "patch_z_noise",
            lambda: interp.patch(model, pairs, heads, mode="noise"),
        )
        for using in ("zero", "mean", "resample"):
            yield (
                f"ablate {which} ({using})",
                f"ablate_z_{using}",
                lambda using=using: interp.ablate(model, pairs, heads, using=using, seed=self.seed),
            )
        yield from self.traces(interp, model)

    def chosen(self, model: Any) -> list[Any]:
        """The heads with most effect, whichever its sign, and others drawn by lot, to compare them with."""
        frame = self.results[HEADS].frame()
        size = {heads: abs(rows["effect"].mean()) for heads, rows in frame.groupby(["layer", "head"])}
        sites = sorted(model.sites("z"), key=lambda site: -size[site.layer, site.head])
        others = sites[STRONGEST:]
        return sites[:STRONGEST] + random.Random(self.seed).sample(others, min(OTHERS, len(others)))

    def traces(self, interp: Any, model: Any) -> Iterator[tuple[str, str, Callable[[], Effects]]]:
        """Causal tracing of facts that the model knows; left out, saying so, if it knows too few."""
        try:
            facts = interp.tasks.facts(model, n=self.trace_facts, seed=self.seed)
        except TaskError as error:
            self.say(f"  –   causal tracing is left out: {error}")
            return
        for component, window in (("resid_post", 1), ("mlp_out", 10), ("attn_out", 10)):
            yield (
                f"trace {len(facts)} facts, restoring {component}" + (f" in windows of {window}" if window > 1 else ""),
                f"trace_{component}",
                lambda component=component: interp.trace(model, facts, component, samples=self.samples, seed=self.seed),
            )

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Say what runs and how long it took."""
        self.say(f"  ▸   {title}")
        begun = time.perf_counter()
        yield
        self.say(f"      {time.perf_counter() - begun:.1f} s")

    def keep(self, path: Path) -> None:
        """Remember a finished file."""
        self.finished.append(path)

    def summarise(self, seconds: float) -> None:
        """The strongest heads, and where everything lies."""
        self.say(f"\nStrongest heads when patched from clean into corrupt (n = {self.n}):")
        for row in self.results[HEADS].summary().head(5).to_dict("records"):
            self.say(f"  L{row['layer']}H{row['head']}  {row['effect']:+.2f}  [{row['lo']:+.2f}, {row['hi']:+.2f}]")
        self.say(f"\nDone in {seconds:.0f} s. Results:")
        for path in self.finished:
            self.say(f"  {os.path.relpath(path)}")
