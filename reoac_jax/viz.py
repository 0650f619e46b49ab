"""Tables and pictures of a run: energy map, projection, losses, operators, and its episodes."""

import csv
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from common.errors import UserError
from common.json_files import read_json_object
from common.rundir import RunDir, atomic_write, atomic_write_json, read_jsonl
from reoac_jax.types import OPERATORS
from reoac_jax.viz_episode import episode_page

LOSSES = ("critic_loss", "actor_loss", "backbone_loss", "total_loss")
_LOSS_COLORS = ("tab:blue", "tab:orange", "tab:green", "black")


def pca_project(vectors: Any) -> np.ndarray:
    """Projects rows on their two leading principal components, the larger one first.

    Rows are centred and projected on the eigenvectors of their covariance (visualisation table).
    The sign of a component, which is arbitrary, makes the largest entry of its eigenvector
    positive. With fewer than two rows or coordinates there is nothing to estimate: the first two
    coordinates are returned, zeros where there is only one.

    Args:
        vectors: [N, F] numbers; N may be 0.

    Returns:
        [N, 2] float64.

    Raises:
        ValueError: if rows have different lengths or hold something not finite.
    """
    data = np.asarray(vectors, np.float64)  # [N, F]
    if data.size == 0:
        return np.zeros((len(data), 2))
    if data.ndim != 2 or not np.isfinite(data).all():
        raise ValueError("vectors must be rows of equal length with finite numbers")
    if min(data.shape) < 2:
        plain = np.zeros((len(data), 2))
        plain[:, : data.shape[1]] = data[:, :2]
        return plain
    centred = data - data.mean(axis=0)
    covariance = centred.T @ centred / (len(data) - 1)  # [F, F]
    _, vectors_up = np.linalg.eigh(covariance)  # ascending eigenvalues
    axes = vectors_up[:, :-3:-1]  # [F, 2], the last two, largest first
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, [0, 1]] < 0, -1.0, 1.0)
    return centred @ axes


def operator_usage(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Counts the records of each operator, in order of first use; those without one are ignored."""
    used = (record.get("operator_id") for record in records)
    return dict(Counter(str(operator) for operator in used if operator is not None))


def energy_map_csv(relation: Any) -> str:
    """Writes a relation matrix as CSV text.

    Args:
        relation: [P, G] numbers.

    Returns:
        P lines of G numbers with 6 decimals, no header.
    """
    return _table(np.asarray(relation, np.float64).tolist())


def embedding_csv(points: np.ndarray) -> str:
    """Writes projected points as CSV text.

    Args:
        points: [N, 2] numbers.

    Returns:
        A header and N lines with 6 decimals.
    """
    return _table(points.tolist(), header=("principal_component_1", "principal_component_2"))


def loss_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Collects the losses of a run.

    Args:
        rows: rows of metrics.jsonl; those without an iteration or any loss are left out.

    Returns:
        {"iteration": [..], <loss>: [..]}, all of one length, nan where a row has no value.
    """
    kept = [
        row for row in rows if row.get("iteration") is not None and any(n in row for n in LOSSES)
    ]
    return {
        name: [math.nan if row.get(name) is None else float(row[name]) for row in kept]
        for name in ("iteration", *LOSSES)
    }


def usage_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Collects how often each operator ran, over training.

    Args:
        rows: rows of metrics.jsonl; those without shares are left out.

    Returns:
        {"iteration": [..], <operator>: [share in 0..1, ..]}, all of one length.
    """
    names = [f"operator/{name}" for name in OPERATORS]
    kept = [row for row in rows if row.get("iteration") is not None and names[0] in row]
    curves = {"iteration": [float(row["iteration"]) for row in kept]}
    for name, column in zip(OPERATORS, names, strict=True):
        curves[name] = [float(row.get(column) or 0.0) for row in kept]
    return curves


def loss_csv(curves: Mapping[str, Sequence[float]]) -> str:
    """Writes curves as CSV text: a header, then one line per iteration, empty for nan."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(curves)
    for iteration, *losses in zip(*curves.values(), strict=True):
        cells = ["" if math.isnan(value) else f"{value:.9g}" for value in losses]
        writer.writerow([f"{iteration:g}", *cells])
    return out.getvalue()


def read_samples(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Reads the episodes a run has written.

    Args:
        directory: `samples/` of the run.

    Returns:
        (file, content) pairs sorted by file name; empty if there is no directory.

    Raises:
        UserError: if a file is not a JSON object.
    """
    return [(path, _read_sample(path)) for path in sorted(directory.glob("*.json"))]


def relation_of(sample: Mapping[str, Any], path: Path) -> np.ndarray | None:
    """Returns the relation matrix of a sample.

    Args:
        sample: content of a sample file.
        path: that file, for messages.

    Returns:
        [P, G] float64; None where it was not saved.

    Raises:
        UserError: if it is not a rectangle of finite numbers.
    """
    relation = sample.get("relation")
    if not relation or not relation[0]:
        return None
    try:
        matrix = np.asarray(relation, np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise UserError(f"{path}: its relation is not a rectangle of numbers; remove this sample")
    return matrix


def run_viz(run_dir: str | Path, sample: str | Path = "", out: str | Path = "") -> list[Path]:
    """Writes what can be drawn from a run (visualisation table).

    energy_map.{csv,png} from one sample; features.json, embedding_proj.{csv,png},
    operator_usage.{json,png} and a page episodes/<sample>.html each from all of them;
    loss.{csv,png} and operator_training.{csv,png} from metrics.jsonl. Without matplotlib the
    pictures are left out, with a warning; everything else is written all the same.

    Args:
        run_dir: the run.
        sample: sample file for the energy map, a path or a name in `samples/`; empty takes the
            first one with a relation.
        out: directory to write to; empty takes `viz/` of the run.

    Returns:
        The files written.

    Raises:
        UserError: if the run or the sample does not exist, has nothing to draw, or is damaged.
    """
    run = RunDir.open(run_dir)
    target = Path(out).expanduser() if out else run.viz
    samples = read_samples(run.samples)
    chosen = _choose(run, samples, sample)
    rows = read_jsonl(run.metrics) if run.metrics.exists() else []
    curves = loss_curves(rows)
    if not samples and chosen is None and not curves["iteration"]:
        raise UserError(
            f"{run.path} holds neither samples/*.json nor losses in metrics.jsonl; nothing to draw"
        )
    try:
        writer = _Writer(target)
        if chosen is not None:
            _energy_map(writer, *chosen)
        elif samples:
            logging.warning("no sample has a relation (rollout.save_relation); no energy map")
        if samples:
            _features(writer, samples)
            _usage(writer, operator_usage(content for _, content in samples))
            _episodes(writer, samples)
        if curves["iteration"]:
            _losses(writer, curves)
            _training_usage(writer, usage_curves(rows))
    except OSError as error:
        raise UserError(
            f"cannot write to {target} ({error.strerror}); choose another directory with --output"
        ) from error
    return writer.written


class _Writer:
    """Puts files into one directory and remembers them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.written: list[Path] = []
        self._pictures = importlib.util.find_spec("matplotlib") is not None
        if not self._pictures:
            logging.warning("matplotlib is not installed: tables only, no pictures")

    def text(self, name: str, content: str) -> None:
        atomic_write(self.directory / name, content)
        self.written.append(self.directory / name)

    def document(self, name: str, content: Any) -> None:
        atomic_write_json(self.directory / name, content)
        self.written.append(self.directory / name)

    def figure(self, width: float = 6.4, height: float = 4.8) -> tuple[Any, Any] | None:
        """Returns (figure, axes) to draw on, None without matplotlib."""
        if not self._pictures:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # No pyplot: it keeps global state and may look for a display.
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()

    def picture(self, name: str, figure: Any) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        atomic_write(self.directory / name, buffer.getvalue())
        self.written.append(self.directory / name)


def _choose(
    run: RunDir, samples: Sequence[tuple[Path, dict[str, Any]]], wanted: str | Path
) -> tuple[Path, np.ndarray] | None:
    if not wanted:
        for path, content in samples:
            relation = relation_of(content, path)
            if relation is not None:
                return path, relation
        return None
    options = (Path(wanted).expanduser(), run.samples / wanted, run.path / wanted)
    found = [option for option in options if option.is_file()]
    if not found:
        raise UserError(f"--sample={wanted}: no such file, nor is there one in {run.samples}")
    path = found[0]
    relation = relation_of(_read_sample(path), path)
    if relation is None:
        raise UserError(f"{path}: holds no relation; train with rollout.save_relation=True")
    return path, relation


def _energy_map(writer: _Writer, path: Path, relation: np.ndarray) -> None:
    writer.text("energy_map.csv", energy_map_csv(relation))
    if drawing := writer.figure():
        figure, axes = drawing
        image = axes.imshow(relation, aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes, label="relation energy")
        axes.set(
            xlabel="generated token index",
            ylabel="prompt token index",
            title=f"Relation energy, {path.stem}",
        )
        writer.picture("energy_map.png", figure)


def _features(writer: _Writer, samples: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    vectors: list[list[float]] = []
    for path, content in samples:
        vector = content.get("feature_vector")
        if not vector:
            continue
        if not _finite(vector) or (vectors and len(vector) != len(vectors[0])):
            raise UserError(
                f"{path}: its feature_vector is not a list of finite numbers, or not as long as "
                "those of the other samples; remove this sample"
            )
        vectors.append([float(value) for value in vector])
    writer.document("features.json", {"features": vectors})
    if not vectors:
        return
    points = pca_project(vectors)  # [N, 2]
    writer.text("embedding_proj.csv", embedding_csv(points))
    if drawing := writer.figure():
        figure, axes = drawing
        axes.scatter(points[:, 0], points[:, 1], s=24, alpha=0.8)
        axes.set(
            xlabel="principal component 1",
            ylabel="principal component 2",
            title=f"Features of {len(points)} episodes",
        )
        axes.grid(alpha=0.3)
        writer.picture("embedding_proj.png", figure)


def _usage(writer: _Writer, usage: Mapping[str, int]) -> None:
    writer.document("operator_usage.json", usage)
    if usage and (drawing := writer.figure()):
        figure, axes = drawing
        axes.bar(list(usage), list(usage.values()), width=0.6)
        axes.set(xlabel="operator of the last step", ylabel="episodes", title="Operator usage")
        axes.yaxis.get_major_locator().set_params(integer=True)
        writer.picture("operator_usage.png", figure)


def _episodes(writer: _Writer, samples: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    for path, content in samples:
        if not content.get("trace"):
            continue  # a run from before traces were kept
        try:
            page = episode_page(content, f"Episode {path.stem}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}: its trace is damaged ({error!r}); remove this sample"
            ) from None
        writer.text(f"episodes/{path.stem}.html", page)


def _training_usage(writer: _Writer, curves: Mapping[str, list[float]]) -> None:
    if not curves["iteration"]:
        return
    writer.text("operator_training.csv", loss_csv(curves))
    if drawing := writer.figure():
        figure, axes = drawing
        shares = [curves[name] for name in OPERATORS]
        axes.stackplot(curves["iteration"], shares, labels=OPERATORS, alpha=0.85)
        axes.set(
            xlabel="iteration",
            ylabel="share of decisions",
            ylim=(0.0, 1.0),
            title="Operators over training",
        )
        axes.margins(x=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside right upper")
        writer.picture("operator_training.png", figure)


def _losses(writer: _Writer, curves: Mapping[str, list[float]]) -> None:
    writer.text("loss.csv", loss_csv(curves))
    if drawing := writer.figure():
        figure, axes = drawing
        marker = "o" if len(curves["iteration"]) < 30 else None
        for name, color in zip(LOSSES, _LOSS_COLORS, strict=True):
            label = name.removesuffix("_loss")
            axes.plot(
                curves["iteration"],
                curves[name],
                label=label,
                color=color,
                marker=marker,
                markersize=3,
                linewidth=1.2,
            )
        axes.set(xlabel="iteration", ylabel="loss", title="Losses")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        # Beside the axes: curves may end in any corner.
        figure.legend(loc="outside right upper")
        writer.picture("loss.png", figure)


def _read_sample(path: Path) -> dict[str, Any]:
    return read_json_object(path, "remove it, or name another sample")


def _finite(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in values
    )


def _table(rows: Iterable[Sequence[float]], header: Sequence[str] = ()) -> str:
    lines = [",".join(header)] if header else []
    lines += [",".join(f"{value:.6f}" for value in row) for row in rows]
    return "".join(line + "\n" for line in lines)
