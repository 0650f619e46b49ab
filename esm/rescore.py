"""The stage rescore: saved answers are graded again, without a model."""

from ml_collections import ConfigDict

from common.errors import require
from common.rundir import atomic_write, json_text
from esm.examples import eval_examples
from esm.grading import Grader
from esm.monitor import Monitor
from esm.results import ROWS, SUMMARY, read_rows, summarize
from esm.runs import Run


def rescore(config: ConfigDict, run: Run, monitor: Monitor) -> None:
    """Grades every `per_example.jsonl` of a run by `eval.grader` and rewrites its verdicts.

    Rows of questions that are not among the evaluated ones of the config stay as they are.
    """
    examples = {example.id: example for example in eval_examples(config)}
    directories = sorted(path.parent for path in run.eval.glob(f"*/{ROWS}"))
    for directory in directories:
        rows = read_rows(directory)
        require(bool(rows), f"{directory / ROWS} holds no whole row; run --stage=eval again")
        known = [row for row in rows if row["example_id"] in examples]
        changed = 0
        with (
            Grader(
                config.prompt.template, config.eval.grader, config.eval.grader_workers
            ) as grader,
            monitor.progress(directory.name, len(known)) as bar,
        ):
            for row in known:
                example = examples[row["example_id"]]
                grader.submit(row, example, row["text"], row["finish_reason"])
            for row, verdict in grader.done(wait=True):
                changed += bool(row["correct"]) != verdict.correct
                row.pop("grading_error", None)
                row.update(verdict.fields())
                bar.update()
        monitor.check("graded results are")
        atomic_write(directory / ROWS, "".join(json_text(row) + "\n" for row in rows))
        summary = summarize(rows, config.decode.max_new_tokens)
        atomic_write(directory / SUMMARY, json_text(summary) + "\n")
        monitor.info(
            f"{directory.name}: {changed} of {len(known)} verdicts changed, accuracy "
            f"{summary['acc']:.3f} ({config.eval.grader})"
        )
