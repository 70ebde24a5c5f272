"""`pairvpr compare RUN RUN ...`: evaluations of the same test, side by side.

A RUN is the output directory (path or URL) of an evaluation. Runs with the same protocol share a table. Runs of one
benchmark with different protocols are refused, naming the difference; so are runs of which no two share a protocol. Two
runs with the same protocol are also compared query by query, by their final answers: decided, else re-ranked, else
retrieved.
Neither torch nor Ray is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import sealed, storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.errors import UserError
from pairvpr.evaluation.bootstrap import bootstrap_interval, sign_test
from pairvpr.evaluation.predictions_file import RERANKED, FinalOrder, final_order_of, prediction_batches
from pairvpr.evaluation.recall import first_hits
from pairvpr.evaluation.tables import FORMATS, note, table
from pairvpr.secrets import without_secrets

pc: Any = compute  # its functions are generated at run time, so their types are unknown

SHOWN_N = ("1", "5", "10")
DIGEST_LENGTH = 12
SIGNIFICANT = 0.05
NEEDED = ("benchmark", "protocol", "model", "recall", "candidate_ceiling", "num_candidates")


@dataclass(frozen=True)
class MeasuredRun:
    """An evaluation with ground truth: its directory as given by the user, and the content of its metrics.json.

    `url` is for reading files; texts show `name`.
    """

    url: str
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        """Its URL as texts show it, without a password."""
        return without_secrets(self.url)

    @property
    def protocol(self) -> dict[str, Any]:
        """Identifies the test."""
        return self.metrics["protocol"]

    @property
    def order(self) -> FinalOrder:
        """Which of its answers are the final ones."""
        return final_order_of(self.metrics)


def compare(urls: Sequence[str], form: str = "text") -> str:
    """The tables of all runs, in one of `tables.FORMATS`.

    Raises `UserError` for fewer than two runs, for anything but finished evaluations with ground truth, for runs of one
    benchmark whose protocols differ, and if no two runs have the same protocol.
    """
    sections = []
    for runs in same_tests(urls):
        lines = [*note(heading(runs), form), *([""] if form == "markdown" else []), *table(rows_of(runs), form)]
        if len(runs) == 2:
            said = [line for text in paired(*runs) for line in note(text, form)]
            lines += ["", *said] if said else []
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def same_tests(urls: Sequence[str]) -> list[list[MeasuredRun]]:
    """The runs, those of the same test together. Raises `UserError` as `compare`."""
    if len(urls) < 2:
        raise UserError(f"{len(urls)} run given: expected two or more output directories of evaluations")
    all_runs = [read_run(url) for url in urls]
    tests: list[list[MeasuredRun]] = []
    for run in all_runs:
        _check_protocol(run, all_runs)
        same = next((runs for runs in tests if runs[0].protocol == run.protocol), None)
        if same is None:
            tests.append([run])
        else:
            same.append(run)
    if len(tests) == len(all_runs):
        raise _different_tests(*all_runs[:2])
    return tests


def read_run(url: str) -> MeasuredRun:
    """The run in the directory `url`. Raises `UserError` unless it is finished and has ground truth."""
    metrics_url = storage.join(url, "metrics.json")
    content = sealed.read_json(metrics_url, "expected the metrics.json of an evaluation")
    if content is None:
        if storage.exists(storage.join(url, SETTINGS_FILE)):
            raise UserError(f"{url}: the run is not finished; run the same command again to continue it")
        raise UserError(f"{url}: no metrics.json there; expected the output directory of an evaluation")
    missing = [key for key in NEEDED if key not in content]
    if missing:
        raise UserError(f"{metrics_url}: no entry {', '.join(missing)}; expected the metrics.json of an evaluation")
    if content["recall"] is None:
        raise UserError(f"{url}: {content['benchmark']} has no ground truth, so there is no recall")
    run = MeasuredRun(url, content)
    try:
        heading([run])
        rows_of([run])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{metrics_url}: damaged; expected the metrics.json of an evaluation") from error
    return run


def _check_protocol(run: MeasuredRun, others: Sequence[MeasuredRun]) -> None:
    """Raise `UserError` if another run of the same benchmark has a different protocol."""
    for other in others:
        if other.metrics["benchmark"] == run.metrics["benchmark"] and other.protocol != run.protocol:
            raise _different_tests(run, other)


def _different_tests(first: MeasuredRun, other: MeasuredRun) -> UserError:
    found = "; ".join(
        f"{key}: {_short(first.protocol.get(key, 'absent'))} here, {_short(other.protocol.get(key, 'absent'))} there"
        for key in {**first.protocol, **other.protocol}
        if _differs(first, other, key)
    )
    names = dict.fromkeys(run.metrics["benchmark"] for run in (first, other))
    return UserError(
        f"{' and '.join(names)}: {first.name} (here) and {other.name} (there) are different tests, so "
        f"their numbers can't be compared: {found}"
    )


def _differs(first: MeasuredRun, other: MeasuredRun, key: str) -> bool:
    absent = object()
    return first.protocol.get(key, absent) != other.protocol.get(key, absent)


def _short(value: object) -> str:
    text = str(value)
    is_digest = len(text) == 64 and " " not in text
    return text[:DIGEST_LENGTH] if is_digest else text


def heading(runs: Sequence[MeasuredRun]) -> str:
    """Names the test of some runs."""
    protocol = runs[0].protocol
    return (
        f"{runs[0].metrics['benchmark']}: {protocol.get('num_queries')} queries, "
        f"{protocol.get('num_database')} database photos; recall@N in percent"
    )


def rows_of(runs: Sequence[MeasuredRun]) -> list[list[str]]:
    """The names of the columns, and a row for each run.

    A run with a decision adds columns of its recall. Where not all final answers are re-ranked ones, the last column
    says what each run's are.
    """
    steps = ["global", "re-ranked", *(["decided"] if any(run.order.is_decided for run in runs) else [])]
    says_order = any(run.order != RERANKED for run in runs)
    recalls = [f"{step}@{n}" for step in steps for n in SHOWN_N]
    heads = ["run", "model", "weights", "K", *recalls, "ceiling", *(["final answers"] if says_order else [])]
    return [heads, *(_row(run, steps) + ([run.order.words] if says_order else []) for run in runs)]


def _row(run: MeasuredRun, steps: Sequence[str]) -> list[str]:
    model, recall = run.metrics["model"], run.metrics["recall"]
    decided = run.metrics["decision"]["recall"] if run.order.is_decided else {}
    of_step = {"global": recall["global"], "re-ranked": recall["reranked"], "decided": decided}
    recalls = [of_step[step].get(n) for step in steps for n in SHOWN_N]
    return [
        run.name,
        f"{model['name']}{' (untrained)' if model.get('untrained') else ''}",
        model["weights_sha256"][:DIGEST_LENGTH],
        str(run.metrics["num_candidates"]),
        *("-" if value is None else f"{value:.1f}" for value in [*recalls, run.metrics["candidate_ceiling"]]),
    ]


def paired(first: MeasuredRun, second: MeasuredRun) -> list[str]:
    """The changes from the first run's best final answers to the second's, and whether they may be chance."""
    before, after = first_answer_is_right(first), first_answer_is_right(second)
    corrected, broken = int((after & ~before).sum()), int((before & ~after).sum())
    difference = bootstrap_interval(after.astype(np.float64) - before.astype(np.float64))
    # With few changed queries the bootstrap interval is too narrow; the sign test is exact.
    p = sign_test(corrected, broken)
    verdict = "beyond chance" if difference.excludes_zero and p < SIGNIFICANT else "not beyond chance"
    return [
        f"{_from_to(first, second)}, N = 1: {corrected} queries corrected, {broken} broken",
        f"the difference in recall@1, {100 * difference.mean:+.1f} points, is {verdict}: 95 % interval "
        f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f} (paired bootstrap over {len(before)} queries), "
        f"exact sign test p = {p:.3g}",
    ]


def _from_to(first: MeasuredRun, second: MeasuredRun) -> str:
    """Both runs by name, with what their final answers are."""
    if first.order == second.order:
        return f"from {first.name} to {second.name}, {first.order.words}"
    return f"from {first.name} ({first.order.words}) to {second.name} ({second.order.words})"


def first_answer_is_right(run: MeasuredRun) -> NDArray[np.bool_]:
    """(Q,) whether the best final answer to each query is a positive, from predictions.parquet."""
    url = storage.join(run.url, "predictions.parquet")
    best, positives = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    num_answered, num_queries = 0, run.protocol.get("num_queries")
    for batch in prediction_batches(url, (run.order.ids, "positives")):
        num_answered += len(batch) - batch.column("positives").null_count
        first = pc.list_slice(batch.column(run.order.ids), 0, 1)
        best += [np.array(ids, np.int64) for ids in first.to_pylist()]
        positives += [np.array(ids or (), np.int64) for ids in batch.column("positives").to_pylist()]
    if num_answered != num_queries:
        raise UserError(
            f"{url}: {num_answered} queries with ground truth, {num_queries} in metrics.json; expected one run's files"
        )
    return first_hits(best, positives) < 1


def arguments_parser() -> argparse.ArgumentParser:
    """What the command line may hold."""
    parser = argparse.ArgumentParser(
        prog="pairvpr compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help="output directory (path or URL) of an evaluation")
    parser.add_argument("--format", metavar="FORMAT", default="text", help=f"one of {', '.join(FORMATS)}")
    return parser


def checked_format(form: str) -> str:
    """Raises `UserError` for a format that tables don't have."""
    if form not in FORMATS:
        raise UserError(f"--format {form}: expected one of {', '.join(FORMATS)}")
    return form


def main(arguments: Sequence[str]) -> int:
    """Print the comparison. Exit codes: 0 done, 2 a user's mistake."""
    try:
        given = arguments_parser().parse_args(arguments)
        print(compare(given.runs, checked_format(given.format)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
