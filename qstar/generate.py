"""Generating a data set: config -> rows -> prompts -> scheduler -> journal.

`python -m qstar.generate` is the same command as `python -m qstar.main`.
"""

import contextlib
import sys
import time

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from common import log
from common.memory import give_back_freed
from common.metrics import GIB, MetricWriter, peak_memory
from common.signals import StopRequest
from qstar.adapters import DatasetAdapter, RowError, Sample
from qstar.backend import Backend, Progress
from qstar.datasets import load_rows
from qstar.defaults import finalize
from qstar.manifest import manifest_of, run_info
from qstar.outcome import diagnostics_line, problem, sample_line, tokens_line
from qstar.requests import Hint, Prompter, adapt, one_prompt, requests, wanted
from qstar.scheduler import Finished, schedule
from qstar.settings import parse_shard, prompt_settings
from qstar.system import (
    System,
    check_backend,
    describe_system,
    max_prompt_tokens,
    open_backend,
    tell,
)
from qstar.tilt import FORCED, IDENTICAL
from qstar.writer import (
    Done,
    Journal,
    check_manifest,
    output_paths,
    refuse_foreign,
    sort_output,
    unwritable,
)

DRY_ROWS = 2
EXIT_ROW_ERRORS = 3


class Report:
    """Progress bar, `metrics.jsonl` and TensorBoard of a run.

    Tags: speed/tokens_per_second, slots/occupied, q/alpha, q/flagged, run/samples, run/errors.
    """

    def __init__(self, config: ConfigDict, total: int, done: int, backend: Backend) -> None:
        """Starts the clock.

        Args:
            config: section `run`.
            total: samples to make now.
            done: samples made by earlier starts.
            backend: for the number of slots.
        """
        shard = parse_shard(config.run.shard)
        self._bar = tqdm(total=total, unit="sample", dynamic_ncols=True, file=sys.stderr)
        self._directory = output_paths(config.run.output, shard)["metrics"]
        self._metrics = MetricWriter(self._directory, enabled=config.run.metrics)
        self._every, self._slots = config.run.log_seconds, backend.slots
        self._done, self.samples, self.errors, self.tokens = done, 0, 0, 0
        self._begin = self._last = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self._window = 0
        self._occupied: list[float] = []
        self._alpha: list[np.ndarray] = []
        self._flags: list[np.ndarray] = []

    def step(self, progress: Progress, occupied: int) -> None:
        """After a burst."""
        self.tokens += progress.tokens
        self._window += progress.tokens
        self._occupied.append(occupied / self._slots)
        speed = self.tokens / max(time.monotonic() - self._begin, 1e-9)
        self._bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
        self._bar.update(0)

    def sample(self, finished: Finished) -> None:
        """After a sample is written."""
        self.samples += 1
        self._bar.update()
        self._alpha.append(finished.output.values["alpha"])
        self._flags.append(finished.output.values["flags"].astype(np.int64))
        if time.monotonic() - self._last >= self._every:
            self.write()

    def error(self) -> None:
        """After a row that could not be used."""
        self.errors += 1
        self._bar.update()

    def write(self) -> None:
        """A row of metrics about the time since the last one."""
        now = time.monotonic()
        row = {
            "speed/tokens_per_second": self._window / max(now - self._last, 1e-9),
            "run/samples": self._done + self.samples,
            "run/errors": self.errors,
            **peak_memory(),
        }
        if self._occupied:
            row["slots/occupied"] = float(np.mean(self._occupied))
        if self._alpha and sum(map(len, self._alpha)):
            alpha, flags = np.concatenate(self._alpha), np.concatenate(self._flags)
            row["q/alpha"] = float(np.mean(alpha))
            row["q/flagged"] = float(np.mean((flags & ~(FORCED | IDENTICAL)) != 0))
        try:
            self._metrics.write(self._done + self.samples, row)
        except OSError as error:
            raise unwritable(self._directory, error) from error
        self._last = now
        self._reset()

    def close(self) -> None:
        """The last row, and the end of the bar."""
        if self._window or self._alpha:
            self.write()
        self._metrics.close()
        self._bar.close()

    def summary(self) -> str:
        """Tokens and speed so far."""
        seconds = max(time.monotonic() - self._begin, 1e-9)
        return f"{self.tokens} tokens in {seconds:.1f} s, {self.tokens / seconds:.1f} tokens/s"


def run_generation(config: ConfigDict, adapter: DatasetAdapter | None = None) -> int:
    """Generates what a config asks for; run again, it goes on.

    Args:
        config: checked here.
        adapter: a data set of the caller's own; None = `config.data`.

    Returns:
        0 = done, or stopped on request; 3 = done, but some rows are in the errors file.

    Raises:
        UserError: bad settings, before anything is loaded or written; a full disk.
    """
    finalize(config, needs_data=adapter is None)
    check_backend(config)
    fingerprint = "given"
    if adapter is None:
        found = load_rows(config)
        adapter, fingerprint = adapt(config, found.rows), found.fingerprint
    system = describe_system(config, one_prompt(config))
    prompter = make_prompter(system, adapter)
    styles = prompter.styles()
    tell(system)
    log.info("prompt style: %s", ", ".join(f"pi_{role} {s}" for role, s in styles.items()))
    if config.run.dry_run:
        show_prompts(config, prompter)
        return 0
    wanted(config, len(adapter), set())  # refuses a range outside the data set
    shard, run = parse_shard(config.run.shard), config.run
    manifest = manifest_of(system, styles, fingerprint)
    if not run.overwrite:
        refuse_foreign(run.output, shard, manifest)
    beside = {"diagnostics": run.save_diagnostics, "tokens": run.save_tokens}
    complete = [name for name, wanted_too in beside.items() if wanted_too]
    with Journal(run.output, shard, run.overwrite, complete) as journal:
        info = run_info(system, adapter)
        check_manifest(journal.paths["manifest"], manifest, run.overwrite, info)
        todo = wanted(config, len(adapter), journal.done)
        status: int | None = 0
        if todo:
            status = _generate(system, prompter, journal, todo)
            give_back_freed()  # the engine is gone; a process may generate again, with other models
        else:
            log.info("%s: nothing left to do", journal.paths["data"])
        if status is not None and run.sort_output:
            journal.sync()
            sort_output(run.output, shard)
    if status is None:
        log.info("stopped (resumable): run the same command again to continue")
    return status or 0


def make_prompter(system: System, adapter: DatasetAdapter) -> Prompter:
    """How rows become requests for a pair of models."""
    config = system.config
    theta, t = prompt_settings(config)
    hint = Hint(config.data.hint_field, config.data.hint_template)
    return Prompter(adapter, theta, t, hint, system.tokenizers, max_prompt_tokens(system))


def show_prompts(config: ConfigDict, prompter: Prompter) -> None:
    """Prints the rendered prompts of the first rows, and whatever is wrong with them."""
    todo = wanted(config, len(prompter.adapter), set())
    rows = list(dict.fromkeys(row for row, _ in todo))
    for row in rows[: config.run.num_samples or DRY_ROWS]:
        try:
            sample = prompter.adapter.sample(row)
            request, shown = prompter.request(sample, 0), prompter.shown(sample)
        except RowError as error:
            print(f"--- row {row}: {error}")
            continue
        sizes = {"theta": len(request.prompt_theta), "t": len(request.prompt_t)}
        for role, text in shown.items():
            print(f"--- row {row}, pi_{role}, {sizes[role]} tokens\n{text}")


def _generate(system: System, prompter: Prompter, journal: Journal, todo: list[Done]) -> int | None:
    """Makes and writes the samples; the exit status, or None if stopped on request."""
    config, texts = system.config, system.texts
    run, repeats = config.run, config.run.repeats
    samples: dict[Done, Sample] = {}
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        slots = None if str(run.slots) == "auto" else int(run.slots)
        backend = open_backend(system, slots, prompter.longest)
        log.info("%s", describe(backend))
        report = Report(config, len(todo), len(journal.done), backend)
        stack.enter_context(contextlib.closing(report))

        def fail(key: Done, stage: str, message: str) -> None:
            journal.write_error(key, stage, message, repeats)
            report.error()

        source = requests(prompter, todo, lambda key, why: fail(key, "prompt", why), samples)
        for finished in schedule(backend, source, texts, lambda: stop.requested, report.step):
            sample = samples.pop(finished.request.key)
            reason = problem(finished, system.alignment is not None)
            if reason is not None:
                fail(finished.request.key, "generate", reason)
                continue
            text = texts.answer(finished.output)
            ids = texts.token_ids(finished.output.columns)
            journal.write(
                sample_line(finished, sample, text, run.extra_fields, repeats),
                diagnostics_line(finished, repeats) if run.save_diagnostics else None,
                tokens_line(finished, ids, repeats) if run.save_tokens else None,
            )
            report.sample(finished)
    log.info("%s: %s", journal.paths["data"], report.summary())
    if report.errors:
        log.warning("%d samples failed: see %s", report.errors, journal.paths["errors"])
    if report.samples + report.errors < len(todo):
        return None
    return EXIT_ROW_ERRORS if report.errors else 0


def describe(backend: Backend) -> str:
    """The backend's sizes on one line."""
    parts = []
    for name, value in backend.describe().items():
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / GIB:.2f} GiB"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


if __name__ == "__main__":
    from qstar.main import start

    start()
