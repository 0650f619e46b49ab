"""The stage case: a few questions, every method, and a page that shows each step."""

from typing import Any

from ml_collections import ConfigDict

from common.errors import UserError
from esm.cases import write_case_page
from esm.datasets import TaskExample
from esm.evaluate import Evaluation, prepare, run_method
from esm.monitor import Monitor
from esm.runs import Run
from esm.session import Sessions

DEFAULT_TAG = "case"


def case_config(config: ConfigDict, given: Any) -> ConfigDict:
    """The config with what the flags of this stage say.

    Args:
        config: parsed, before it is finalized.
        given: flags `methods`, `tag`, `example_ids`.
    """
    with config.unlocked():
        if given.methods:
            config.eval.methods = tuple(name.strip() for name in given.methods.split(","))
        config.eval.ablations = ()
    return config


def run_case(
    config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any
) -> None:
    """Answers the named questions by every method.

    Raises:
        UserError: an id is unknown, or as for the stage eval.
    """
    evaluation = prepare(config, run, sessions, monitor)
    ids = [name.strip() for name in given.example_ids.split(",") if name.strip()]
    examples = _named(evaluation, ids)
    tag = given.tag or DEFAULT_TAG
    name = "-".join(example.id.replace("/", "_") for example in examples)
    shown: dict[str, list[dict[str, Any]]] = {}
    chosen = Evaluation(
        evaluation.config,
        run,
        evaluation.source,
        examples,
        sessions,
        monitor,
        label=lambda method: f"{tag}_{method}_{name}_T{evaluation.max_tokens}",
    )
    for method in config.eval.methods:
        shown[method] = run_method(chosen, method)
    path = run.path / "cases" / f"{tag}_{name}_T{evaluation.max_tokens}.md"
    write_case_page(path, examples, shown)
    monitor.info(f"cases: {path}")


def _named(evaluation: Evaluation, ids: list[str]) -> list[TaskExample]:
    if not ids:
        return evaluation.examples[:1]
    by_id = {example.id: example for example in evaluation.examples}
    missing = [name for name in ids if name not in by_id]
    if missing:
        known = ", ".join(list(by_id)[:5])
        raise UserError(
            f"--example_ids: {', '.join(missing)} are not among the {len(by_id)} evaluated "
            f"questions (ids such as {known}); raise task.max_eval_examples or name others"
        )
    return [by_id[name] for name in ids]
