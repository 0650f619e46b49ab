"""The stage eval: methods and ablations on the evaluated questions, and the tables of a run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from common import flags
from common.errors import require
from common.rundir import json_text
from esm import figures, tables
from esm.cases import write_cases
from esm.compare import TRUNCATION_WARNING, compare, diagnose
from esm.datasets import TaskExample, check_disjoint
from esm.defaults import ABLATIONS
from esm.examples import eval_examples
from esm.library import Candidates, select_rules, selected_layers, tuned
from esm.memory import Memory, load_memory, read_manifest
from esm.methods import (
    make_policy,
    policy_settings,
    run_greedy,
    run_policy,
    run_self_consistency,
    static_policy,
)
from esm.mine import mine_states
from esm.monitor import Monitor
from esm.policies import NULL, VARIANTS
from esm.results import Results, read_rows
from esm.runs import Run, artifact_run
from esm.session import Session, Sessions, check_memory, check_width

SAMPLED = ("greedy", "self_consistency")
# What the rows of any method depend on.
_COMMON = (
    "seed",
    "model.dtype",
    "model.params_dtype",
    "task.dataset",
    "task.split_seed",
    "decode",
    "eval.grader",
)
_STEERED = ("control_points", "online")
# What changes nothing in the rows.
_NEUTRAL = ("online.batch_size_examples", "online.protocol", "decode.logprobs")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all methods of a stage share.

    Attributes:
        config: finalized; the tuned strength is in it.
        run: where results go.
        source: the run whose memory is used.
        examples: the questions.
        sessions: models, loaded when needed.
        monitor: log and progress.
        label: names the directory of a method, None = `directory_name`.
    """

    config: ConfigDict
    run: Run
    source: Run
    examples: list[TaskExample]
    sessions: Sessions
    monitor: Monitor
    label: Callable[[str], str] | None = None

    @property
    def max_tokens(self) -> int:
        """T."""
        return int(self.config.decode.max_new_tokens)

    def directory(self, method: str) -> Path:
        """Where a method's results go."""
        name = self.label(method) if self.label else directory_name(self.config, method)
        return self.run.eval / name


def evaluate(
    config: ConfigDict,
    run: Run,
    sessions: Sessions,
    monitor: Monitor,
    on_start: Callable[[], None],
) -> None:
    """Runs every method and ablation of the config and writes the tables.

    Args:
        config: finalized.
        run: where results go.
        sessions: models.
        monitor: log and progress.
        on_start: called when everything is checked, before anything is written.

    Raises:
        UserError: no memory, one of another model, or mined questions among the evaluated.
    """
    evaluation = prepare(config, run, sessions, monitor)
    config = evaluation.config
    # Results of other settings are refused before any are added.
    for method in config.eval.methods:
        open_results(evaluation, method, memory_digest(evaluation, method))
    on_start()
    for method in config.eval.methods:
        run_method(evaluation, method)
    write_tables(evaluation)
    for name in config.eval.ablations:
        run_ablation(evaluation, name)
    write_ablations(evaluation)


def prepare(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor) -> Evaluation:
    """Checks everything that can be checked before a model is loaded."""
    require(
        config.online.protocol == "P1",
        f"online.protocol={config.online.protocol!r}: only P1 exists",
    )
    steered = needs_memory(config)
    source = artifact_run(config, run) if steered else run
    examples = eval_examples(config)
    if steered:
        memory, manifest = load_memory(source.memory)
        for warning in check_memory(manifest, sessions, config, source):
            monitor.warning(warning)
        used = set(manifest["mined"])
        chosen = tuned(config, source)
        if chosen:
            config = config.copy_and_resolve_references()
            with config.unlocked():
                config.online.k_scale = float(chosen["k_scale"])
            used |= set(chosen["dev"])
            monitor.info(f"tuned on the dev part: k_scale={config.online.k_scale:g}")
        keys = [example.key for example in examples]
        shared = check_disjoint(used, keys, config.task.allow_overlap)
        if shared:
            monitor.warning(
                f"{shared} of the {len(examples)} evaluated questions were mined or tuned on: the "
                "results are not honest ones"
            )
        if not len(memory.keys):
            monitor.warning("the memory is empty: nothing will be steered")
    return Evaluation(config, run, source, examples, sessions, monitor)


def needs_memory(config: ConfigDict) -> bool:
    """Whether any method or ablation looks into the memory."""
    methods = {"esm", "static"} & set(config.eval.methods)
    return bool(methods or set(config.eval.ablations) - {"no_memory"})


def directory_name(config: ConfigDict, method: str) -> str:
    """The directory of a method's results under eval/."""
    variant = config.online.variant
    label = ("ESM" if variant == "esm" else variant) if method == "esm" else method
    tag = f"_{config.eval.tag}" if config.eval.tag else ""
    return f"{label}_T{config.decode.max_new_tokens}{tag}"


def run_method(evaluation: Evaluation, method: str) -> list[dict[str, Any]]:
    """One method on all questions; rows that are there already are kept."""
    config = evaluation.config
    if method in SAMPLED:
        return _run_sampled(evaluation, method)
    memory, manifest = load_memory(evaluation.source.memory)
    settings = policy_settings(config, config.online.variant)
    results = open_results(evaluation, method, memory_digest(evaluation, method))
    if results.missing:
        session = evaluation.sessions.get("online")
        check_width(manifest, session, evaluation.source)
        if method == "static":
            policy = static_policy(config, memory, settings)
        else:
            policy = make_policy(settings, memory, session.engine.hidden_size)
        _run(evaluation, session, policy, results, method)
    return _finish(evaluation, results, method)


def run_ablation(evaluation: Evaluation, name: str) -> list[dict[str, Any]]:
    """One variant or named ablation at the same budget."""
    overrides: Mapping[str, Any] = {"online.variant": name} if name in VARIANTS else ABLATIONS[name]
    config = evaluation.config.copy_and_resolve_references()
    with config.unlocked():
        for key, value in overrides.items():
            section, _, field = key.partition(".")
            config[section][field] = value
    changed = dataclasses.replace(evaluation, config=config)
    memory, digest = _ablation_memory(changed, name, overrides)
    results = open_results(changed, name, digest)
    if results.missing:
        session = evaluation.sessions.get("online")
        settings = policy_settings(config, config.online.variant)
        policy = make_policy(settings, memory, session.engine.hidden_size)
        _run(changed, session, policy, results, name)
    return _finish(changed, results, name)


def memory_digest(evaluation: Evaluation, method: str) -> str:
    """Identity of the memory a method uses, "" if it uses none."""
    if method in SAMPLED:
        return ""
    return str(read_manifest(evaluation.source.memory).get("digest", ""))


def open_results(evaluation: Evaluation, method: str, memory_digest: str) -> Results:
    """The results of a method, with the settings they depend on."""
    config = evaluation.config
    sections = _COMMON + (() if method in SAMPLED else _STEERED)
    if method == "self_consistency":
        sections += ("eval.sc_samples", "eval.sc_temperature", "offline_mine.top_p")
    if method == "static":
        sections += ("eval.static_layer", "eval.static_strength")
    settings = flags.select(config, sections)
    settings = {key: value for key, value in settings.items() if key not in _NEUTRAL}
    settings["model"] = evaluation.sessions.model_name
    settings["prompt"] = evaluation.sessions.prompt_record
    if commit := evaluation.examples[0].meta.get("commit"):
        settings["dataset_commit"] = commit
    if method not in SAMPLED:
        settings["memory"] = memory_digest
    return Results(evaluation.directory(method), settings, evaluation.examples)


def write_tables(evaluation: Evaluation) -> None:
    """Main table, diagnostics, comparison, figure and cases of the methods that ran."""
    config, run, top = evaluation.config, evaluation.run, evaluation.max_tokens
    rows = {
        method: _read(evaluation, method)
        for method in tables.METHOD_TITLES
        if _has(evaluation, method)
    }
    if not rows:
        return
    found = {method: diagnose(method, of_method) for method, of_method in rows.items()}
    split = str(evaluation.examples[0].meta["split"])
    accuracies = {method: row["acc"] for method, row in found.items()}
    tables.write_main(run.tables, config.task.dataset, split, top, accuracies)
    tables.write_diagnostics(run.tables, top, found)
    both: dict[str, Any] = {m: rows[m] for m in ("greedy", "esm") if m in rows}
    drawn: Mapping[str, Any] = both or rows
    figures.draw_lengths(run.path / "figures", top, drawn)
    if len(both) == 2:
        row = compare(both["greedy"], both["esm"], top, config.eval.bootstrap)
        tables.write_comparison(run.tables, row)
        write_cases(
            run.path / "cases" / f"cases_T{top}.md",
            evaluation.examples,
            both["greedy"],
            both["esm"],
            config.eval.case_top_n,
        )
        evaluation.monitor.info(
            f"esm against greedy on {row['n']} questions: {row['acc_diff']:+.3f} accuracy (95 % "
            f"{row['acc_diff_low']:+.3f} to {row['acc_diff_high']:+.3f}, McNemar p "
            f"{row['mcnemar_p']:.3g}), {row['tokens_diff_mean']:+.1f} tokens"
        )
    for method, row in found.items():
        if row["trunc_rate"] >= TRUNCATION_WARNING:
            evaluation.monitor.warning(
                f"{row['trunc_rate']:.0%} of the answers of {method} were cut at T={top}; raise "
                "decode.max_new_tokens"
            )
    shown = ("method", "n", "acc", "acc_low", "acc_high", "tokens_mean", "overhead_mean",
             "positions_mean", "tool_step_rate")  # fmt: skip
    evaluation.monitor.info("\n" + tables.text_table(list(found.values()), shown))


def write_ablations(evaluation: Evaluation) -> None:
    """`ablation.csv`, and every ablation compared with greedy decoding."""
    config, top = evaluation.config, evaluation.max_tokens
    names = [name for name in config.eval.ablations if _has(evaluation, name)]
    if not names:
        return
    rows = {name: _read(evaluation, name) for name in names}
    table = [
        {"variant": name, "T_max": top, "acc": diagnose(name, rows[name])["acc"]} for name in names
    ]
    tables.write_csv(evaluation.run.tables / "ablation.csv", table)
    if _has(evaluation, "greedy"):
        greedy = _read(evaluation, "greedy")
        compared = [
            {"variant": name, **compare(greedy, rows[name], top, config.eval.bootstrap)}
            for name in names
        ]
        tables.write_csv(evaluation.run.tables / f"ablation_compare_T{top}.csv", compared)
    evaluation.monitor.info("\n" + tables.text_table(table, ("variant", "T_max", "acc")))


def _run_sampled(evaluation: Evaluation, method: str) -> list[dict[str, Any]]:
    results = open_results(evaluation, method, "")
    if results.missing:
        session = evaluation.sessions.get("rollouts")
        run = run_greedy if method == "greedy" else run_self_consistency
        run(evaluation.config, session, results, evaluation.monitor, evaluation.max_tokens)
    return _finish(evaluation, results, method)


def _run(
    evaluation: Evaluation, session: Session, policy: Any, results: Results, name: str
) -> None:
    run_policy(
        evaluation.config,
        session,
        policy,
        results,
        evaluation.monitor,
        name,
        evaluation.max_tokens,
    )


def _finish(evaluation: Evaluation, results: Results, name: str) -> list[dict[str, Any]]:
    results.start()
    summary = results.finish(evaluation.max_tokens)
    rows = results.rows
    monitor = evaluation.monitor
    monitor.info(
        f"{name}: {summary['acc']:.3f} ({summary['acc_low']:.3f} to {summary['acc_high']:.3f}) on "
        f"{summary['n']} questions, {summary['tokens_mean']:.1f} tokens, "
        f"{summary['probe_tokens_mean']:.1f} probe tokens each, {summary['wall_s']:.0f} s"
    )
    if summary["grading_errors"]:
        monitor.warning(f"{summary['grading_errors']} answers could not be graded in time: wrong")
    _show(monitor, name, rows, summary)
    return rows


def _show(
    monitor: Monitor, name: str, rows: Sequence[dict[str, Any]], summary: Mapping[str, Any]
) -> None:
    """The TensorBoard view of a method."""
    count = int(summary["n"])
    scalars = {
        f"{name}/accuracy": float(summary["acc"]),
        f"{name}/tokens_mean": float(summary["tokens_mean"]),
    }
    if summary["wall_s"]:
        total = sum(row["tokens_used"] for row in rows)
        scalars[f"{name}/tokens_per_second"] = total / summary["wall_s"]
    steps = [step for row in rows for step in row.get("steps", ()) if "mem_m" in step]
    for point in sorted({step["mem_m"] for step in steps}):
        at = [step["chosen"] != NULL for step in steps if step["mem_m"] == point]
        scalars[f"{name}/tool_rate_m{point}"] = sum(at) / len(at)
    for reason in sorted({step["mem_reason"] for step in steps if "mem_reason" in step}):
        found = sum(step.get("mem_reason") == reason for step in steps)
        scalars[f"{name}/lookup_{reason}"] = float(found)
    monitor.scalars(count, scalars)
    looked_up = [step for step in steps if "mem_reason" in step]
    monitor.histogram(count, f"{name}/score", [step["chosen_score"] for step in looked_up])
    used = [step["chosen_scale"] for step in looked_up if step["chosen"] != NULL]
    monitor.histogram(count, f"{name}/alpha", used)


def _has(evaluation: Evaluation, method: str) -> bool:
    return (evaluation.directory(method) / "summary.jsonl").is_file()


def _read(evaluation: Evaluation, method: str) -> list[dict[str, Any]]:
    wanted = {example.id for example in evaluation.examples}
    rows = read_rows(evaluation.directory(method))
    return [row for row in rows if row["example_id"] in wanted]


def _ablation_memory(
    evaluation: Evaluation, name: str, overrides: Mapping[str, Any]
) -> tuple[Memory | None, str]:
    """The memory an ablation uses, and what identifies it."""
    config, source = evaluation.config, evaluation.source
    if name == "no_memory":
        return None, ""
    offline = [key for key in overrides if key.startswith("offline_")]
    if not offline:
        memory, manifest = load_memory(source.memory)
        return memory, str(manifest.get("digest", ""))
    if any(key.startswith("offline_mine.") for key in offline):
        source = _mine_again(evaluation, name)
    candidates = Candidates(source)
    rules = select_rules(config)
    layers = selected_layers(config, evaluation.source, candidates.manifest)
    memory = candidates.memory(rules, layers)
    identity = f"{name} of {evaluation.source.path.name}: {json_text(rules._asdict())}"
    return memory, identity


def _mine_again(evaluation: Evaluation, name: str) -> Run:
    """Pairs by other rules from the same rollouts, in a run of their own."""
    source, target = evaluation.source, Run(evaluation.run.path / "ablations" / name)
    if not target.has("mine"):
        target.mine.mkdir(parents=True, exist_ok=True)
        for file in ("rollouts.jsonl", "rollouts.json"):
            content = (source.mine / file).read_bytes()
            (target.mine / file).write_bytes(content)
        mine_states(evaluation.config, target, evaluation.sessions, evaluation.monitor)
    return target
