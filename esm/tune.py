"""The stage tune: layer and strength are chosen on a dev part, then frozen.

Every setting of the grid answers the dev questions; the most accurate wins, fewer tokens decide
ties, then the order of the grid. The choice stands in `tune/chosen.json`: select keeps to the layer
and eval takes the strength (unless `tune.use` is False), so neither is ever chosen on the questions
that are reported.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from common import flags
from common.errors import require
from common.rundir import atomic_write_json, json_text
from esm import tables
from esm.datasets import TaskExample, check_disjoint
from esm.examples import dev_examples, identities
from esm.layers import resolve_layers
from esm.library import Candidates, select_rules
from esm.methods import make_policy, policy_settings, run_greedy, run_policy
from esm.monitor import Monitor
from esm.results import Results
from esm.runs import Run
from esm.session import Sessions

_DEPENDS = (
    "seed",
    "model.dtype",
    "model.params_dtype",
    "task.dataset",
    "decode",
    "control_points",
    "offline_select",
    "online",
    "eval.grader",
)
_NEUTRAL = ("online.batch_size_examples", "online.k_scale", "offline_select.layers")


def tune(
    config: ConfigDict,
    run: Run,
    sessions: Sessions,
    monitor: Monitor,
    on_start: Callable[[], None],
) -> dict[str, Any]:
    """Runs the grid and writes the choice.

    Returns:
        The row that won.

    Raises:
        UserError: the grid is empty, names layers that were not mined, or the dev part was mined.
    """
    grid = config.tune.k_scales
    require(
        bool(grid),
        "tune.k_scales is empty: name strengths to try, such as --config.tune.k_scales='(0.1,0.5)'",
    )
    candidates = Candidates(run)
    layers = _layers(config, candidates.manifest)
    examples = dev_examples(config)
    check_disjoint(candidates.manifest["mined"], identities(examples), config.task.allow_overlap)
    on_start()
    monitor.info(
        f"tuning on {len(examples)} dev questions: layers {', '.join(map(str, layers))}, "
        f"strengths {', '.join(f'{k:g}' for k in grid)}"
    )
    rows = [_greedy(config, run, sessions, monitor, examples)]
    for layer in layers:
        memory = candidates.memory(select_rules(config), (layer,))
        for k_scale in grid:
            results = _results(config, run, sessions, examples, f"L{layer}_k{k_scale:g}")
            if results.missing:
                session = sessions.get("online")
                settings = policy_settings(config, config.online.variant, float(k_scale))
                policy = make_policy(settings, memory, session.engine.hidden_size)
                name = f"layer {layer}, k_scale {k_scale:g}"
                top = config.decode.max_new_tokens
                run_policy(config, session, policy, results, monitor, name, top)
            results.start()
            rows.append(
                {"layer": layer, "k_scale": float(k_scale)}
                | results.finish(config.decode.max_new_tokens)
            )
    shown = [{key: row.get(key, "") for key in _COLUMNS} for row in rows]
    tables.write_csv(run.tune / "grid.csv", shown)
    monitor.info("\n" + tables.text_table(shown, _COLUMNS))
    best = max(rows[1:], key=lambda row: (row["acc"], -row["tokens_mean"]))
    chosen = {
        "layer": best["layer"],
        "k_scale": best["k_scale"],
        "dev_acc": best["acc"],
        "dev_acc_greedy": rows[0]["acc"],
        "dev": identities(examples),
    }
    atomic_write_json(run.tune / "chosen.json", chosen)
    monitor.info(f"chosen: layer {best['layer']}, k_scale {best['k_scale']:g}")
    return chosen


_COLUMNS = ("layer", "k_scale", "n", "acc", "acc_low", "acc_high", "tokens_mean",
            "forward_positions_mean")  # fmt: skip


def _layers(config: ConfigDict, manifest: dict[str, Any]) -> tuple[int, ...]:
    mined = tuple(int(layer) for layer in manifest["layers"])
    if not config.tune.layers:
        return mined
    layers = resolve_layers(config.tune.layers, manifest["num_layers"])
    missing = [layer for layer in layers if layer not in mined]
    require(not missing, f"tune.layers: {missing} were not mined (mined: {list(mined)})")
    return layers


def _greedy(
    config: ConfigDict,
    run: Run,
    sessions: Sessions,
    monitor: Monitor,
    examples: list[TaskExample],
) -> dict[str, Any]:
    """What is to be beaten."""
    results = _results(config, run, sessions, examples, "greedy")
    if results.missing:
        session = sessions.get("rollouts")
        run_greedy(config, session, results, monitor, config.decode.max_new_tokens)
    results.start()
    return {"layer": "greedy", "k_scale": ""} | results.finish(config.decode.max_new_tokens)


def _results(
    config: ConfigDict, run: Run, sessions: Sessions, examples: list[TaskExample], name: str
) -> Results:
    settings = {
        key: value for key, value in flags.select(config, _DEPENDS).items() if key not in _NEUTRAL
    }
    settings["model"] = sessions.model_name
    settings["prompt"] = sessions.prompt_record
    settings["dev"] = hashlib.sha256(json_text(identities(examples)).encode()).hexdigest()[:16]
    return Results(run.tune / name, settings, examples)
