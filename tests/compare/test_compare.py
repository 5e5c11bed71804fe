"""The comparison: what is run next, records that resume, the report, and a real reduced run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edge_tcur.cli import edge_tcur
from edge_tcur.compare import runner, segmentation
from edge_tcur.compare.methods import METHODS, find_method
from edge_tcur.compare.problems import DigitsProblem, TextProblem
from edge_tcur.compare.records import (
    Job,
    Record,
    check_problems,
    read_records,
    sole_writer,
    write_record,
)
from edge_tcur.compare.report import describe, draw_plot, markdown, standings, summarize
from edge_tcur.compare.runner import Grid, best_rate, missing_jobs
from edge_tcur.errors import ComparisonError
from edge_tcur_runtime.errors import ConfigError, DataError, FileFormatError, UsageError


def record(method, rate, seed, validation, test=None, problem="digits", numbers=1000):
    return Record(
        problem=problem,
        method=method,
        rate=rate,
        seed=seed,
        validation=validation,
        test=validation if test is None else test,
        trained_numbers=numbers,
        shipped_bytes=4 * numbers,
        seconds=1.0,
        prepare_seconds=0.1,
        steps=10,
        final_loss=0.5,
    )


def grid(*methods, seeds=3):
    return Grid([DigitsProblem()], methods, seeds)


def test_first_every_rate_is_swept_on_one_seed():
    jobs = missing_jobs(grid("lora-r8"), [])
    assert jobs == [Job("digits", "lora-r8", rate, 0) for rate in sorted(METHODS["lora-r8"].rates)]


def test_a_sweep_goes_on_where_the_best_rate_lies_at_its_end():
    rates = sorted(METHODS["lora-r8"].rates)
    rising = [record("lora-r8", rate, 0, 0.5 + rate) for rate in rates]
    assert missing_jobs(grid("lora-r8"), rising) == [Job("digits", "lora-r8", 2 * rates[-1], 0)]
    falling = [record("lora-r8", rate, 0, 0.5 - rate) for rate in rates]
    assert missing_jobs(grid("lora-r8"), falling) == [Job("digits", "lora-r8", rates[0] / 2, 0)]
    more = [*rising, record("lora-r8", 2 * rates[-1], 0, 0.9), record("lora-r8", 4 * rates[-1], 0, 0.95)]
    assert {job.seed for job in missing_jobs(grid("lora-r8"), more)} == {1, 2}


def test_the_other_seeds_use_the_rate_that_validation_chose():
    rates = sorted(METHODS["lora-r8"].rates)
    done = [
        record("lora-r8", rate, 0, score, test=1 - score)
        for rate, score in zip(rates, (0.5, 0.9, 0.6), strict=True)
    ]
    assert missing_jobs(grid("lora-r8"), done) == [
        Job("digits", "lora-r8", rates[1], seed) for seed in (1, 2)
    ]
    done += [record("lora-r8", rates[1], seed, 0.8) for seed in (1, 2)]
    assert missing_jobs(grid("lora-r8"), done) == []
    assert missing_jobs(grid("lora-r8", seeds=4), done) == [Job("digits", "lora-r8", rates[1], 3)]


def test_of_equal_rates_the_lower_one_is_chosen():
    assert best_rate([record("full", 0.2, 0, 0.7), record("full", 0.1, 0, 0.7)]) == 0.1


def test_records_survive_a_line_that_was_cut_off(tmp_path):
    first, second = record("full", 0.1, 0, 0.7), record("full", 0.2, 0, 0.8)
    write_record(tmp_path, first)
    whole = (tmp_path / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(whole + json.dumps(asdict(second)).encode()[:40])
    assert read_records(tmp_path) == [first]
    write_record(tmp_path, second)
    assert read_records(tmp_path) == [first, second]
    (tmp_path / "records.jsonl").write_bytes((tmp_path / "records.jsonl").read_bytes()[:-1])
    write_record(tmp_path, first)  # only the end of the line had been cut off
    assert read_records(tmp_path) == [first, second, first]


@pytest.mark.parametrize(
    "line",
    [b"{", b"12", b"[]", b'{"problem": "digits"}', b"\xff\xfe", b'{"test": "high"}', b'{"seed": true}'],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    whole = asdict(record("full", 0.1, 0, 0.7))
    write_record(tmp_path, record("full", 0.1, 0, 0.7))
    if line.startswith((b'{"test', b'{"seed')):
        line = json.dumps(whole | json.loads(line)).encode()
    path = tmp_path / "records.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(FileFormatError, match=r"records.jsonl, line 1.*not a record"):
        read_records(tmp_path)


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with sole_writer(tmp_path):
        script = (
            "import sys; from pathlib import Path; from edge_tcur.compare.records import sole_writer\n"
            "with sole_writer(Path(sys.argv[1])): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False
        )
        assert "another comparison writes to" in other.stderr
    with sole_writer(tmp_path):
        pass


def test_records_of_other_settings_are_not_gone_on_with(tmp_path):
    check_problems(tmp_path, {"digits": {"epochs": 60}})
    check_problems(tmp_path, {"digits": {"epochs": 60}, "trec-10": {"epochs": 10}})
    with pytest.raises(ConfigError, match="epochs"):
        check_problems(tmp_path, {"digits": {"epochs": 1}})
    check_problems(tmp_path, {"trec-10": {"epochs": 10}})
    (tmp_path / "problems.json").write_text("[1]")
    with pytest.raises(FileFormatError, match=r"problems\.json"):
        check_problems(tmp_path, {})


def test_a_run_that_fails_is_named_and_the_others_are_recorded(tmp_path, monkeypatch):
    """In threads in the place of processes: the runs are ours to fail."""

    def run_job(problem, job, work, device):
        if job.method == "full" and job.rate == 1e-4:
            raise RuntimeError("no room on the device")
        return replace(record(job.method, job.rate, job.seed, 0.7), problem=problem.name)

    monkeypatch.setattr(runner, "run_job", run_job)
    monkeypatch.setattr(runner, "prepare_problem", lambda *_: None)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    with pytest.raises(ComparisonError, match=r"digits, full, rate 0.0001, seed 0.*no room on the device"):
        runner.run_grid(grid("full", "head"), tmp_path, workers=2)
    found = {(item.method, item.rate, item.seed) for item in read_records(tmp_path)}
    assert {("head", 0.0, seed) for seed in range(3)} < found
    assert {("full", 5e-5, 0), ("full", 2e-4, 0)} < found
    monkeypatch.setattr(
        runner, "run_job", lambda problem, job, *_: record(job.method, job.rate, job.seed, 0.7)
    )
    again = runner.run_grid(grid("full", "head"), tmp_path, workers=2)
    assert len(again) == len({item.job for item in again}) == len(read_records(tmp_path))
    assert missing_jobs(grid("full", "head"), again) == []


def test_a_run_that_is_recorded_twice_counts_once():
    once = [record("full", 0.1, seed, 0.9, test=0.5 + seed / 10) for seed in range(2)]
    assert summarize([*once, replace(once[0], seconds=9.0)]).rows[0].seeds == 2
    assert summarize(once + once).rows == summarize(once).rows


def test_scores_are_paired_by_their_seeds():
    """A comparison that was interrupted may lack a seed in the middle."""
    records = [record("full", 0.1, 0, 0.9, test=0.9), record("head", 0.0, 0, 0.5, test=0.5, numbers=0)]
    records += [record("lora-r8", 0.1, seed, 0.9, test=test) for seed, test in ((0, 0.6), (1, 0.1), (2, 0.8))]
    records += [record("update-r8", 0.1, seed, 0.9, test=test) for seed, test in ((0, 0.6), (2, 0.8))]
    found = {one.method: one for one in standings(summarize(records))}
    assert found["update-r8"].to_lora == pytest.approx(0)


@pytest.mark.parametrize(
    "name", ["{", '{"rnk": 3}', '{"preset": "papr"}', '{"rank": "3"}', '{"rank": 0}', '{"preset": 1}']
)
def test_settings_of_a_method_that_are_wrong(name):
    with pytest.raises(ConfigError):
        find_method(name)


def test_records_come_back_as_they_were(tmp_path):
    records = [record("full", 0.1, seed, 0.7) for seed in range(3)]
    for item in records:
        write_record(tmp_path, item)
    assert read_records(tmp_path) == records


def test_the_report_takes_the_chosen_rate_and_the_deviation_of_a_sample(tmp_path):
    records = [record("full", 0.1, 0, 0.9, test=0.8), record("full", 0.2, 0, 0.5, test=1.0)]
    records += [record("full", 0.1, 1, 0.9, test=0.9), record("head", 0.0, 0, 0.5, numbers=0)]
    summary = summarize(records)
    row = next(row for row in summary.rows if row.method == "full")
    assert (row.mean, row.seeds, row.rate, row.at_edge) == (pytest.approx(0.85), 2, 0.1, True)
    assert row.deviation == pytest.approx(math.sqrt(0.005))
    assert summary.matters["digits"] == pytest.approx(0.35)
    assert "beats a trained head by 35.0 points" in describe(summary)
    draw_plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_standings_compare_the_seeds_that_both_have():
    """LoRA's second seed, which the other method lacks, does not count; nor does a problem without a gap."""
    records = [record("full", 0.1, 0, 0.9, test=0.9), record("head", 0.0, 0, 0.5, test=0.5, numbers=0)]
    records += [
        record("lora-r8", 0.1, seed, 0.9, test=test, numbers=400) for seed, test in ((0, 0.8), (1, 0.4))
    ]
    records += [record("update-r8", 0.1, 0, 0.9, test=0.85, numbers=100)]
    even = [record(name, 0.1, 0, 0.9, test=0.9) for name in ("full", "head", "lora-r8", "update-r8")]
    records += [replace(item, problem="even") for item in even]
    found = {one.method: one for one in standings(summarize(records))}
    one = found["update-r8"]
    assert (one.problems, one.seeds, one.share) == (("digits",), 1, 0.25)
    assert (one.to_lora, one.worst, one.to_full) == (
        pytest.approx(0.05),
        pytest.approx(0.05),
        pytest.approx(-0.05),
    )
    assert (found["lora-r8"].to_lora, found["full"].to_full) == (0, 0)
    text = markdown(summarize(records))
    assert "| update-r8 | digits | +5.0 | +5.0 | -5.0 | 1/4 |" in text


def test_where_a_trained_head_does_as_well_nothing_is_judged():
    summary = summarize([record("full", 0.1, 0, 0.81), record("head", 0.0, 0, 0.80)])
    assert summary.to_dict()["judged_on"] == []
    assert "adaptation does not matter here" in describe(summary)


def test_a_method_may_be_given_as_settings():
    method = find_method('{"preset": "gradient", "rank": 4}')
    assert method.rates == METHODS["gradient-r8"].rates
    with pytest.raises(ConfigError, match="not known") as caught:
        find_method("lora-r9")
    assert "lora-r8" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    sorted({*METHODS} - {name for name in METHODS if name.endswith(("-r16", "-r32"))} - {"full"}),
)
def test_every_method_begins_as_the_base_and_counts_what_it_trains(name, vit_dir):
    """A method that starts from a learnt update has learnt nothing here: its update is zero."""
    from edge_tcur.method.gradients import mean_gradients
    from edge_tcur.models import load_base
    from edge_tcur.tasks import find_task

    task = find_task("image-classification")
    base = load_base(str(vit_dir), task, ("0", "1", "2"), {})
    inputs = {"pixel_values": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    expected = base.model(**inputs).detach()

    def directions(selection, targets):
        found = mean_gradients(
            base.model, targets, [lambda: task.loss(base.model(**inputs), torch.tensor([0, 1, 2, 0]))]
        )
        return found if selection == "gradient" else {key: 1e-9 * value for key, value in found.items()}

    prepared = find_method(name).prepare(base, directions)
    torch.testing.assert_close(base.model(**inputs), expected, atol=1e-5, rtol=1e-4)
    assert prepared.trained_numbers == sum(value.numel() for value in prepared.parameters)
    if name != "head":
        task.loss(base.model(**inputs), torch.tensor([0, 1, 2, 0])).backward()
        assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in prepared.parameters)


def test_few_shot_parts_are_disjoint_and_depend_on_the_seed(tmp_path, bert_dir):
    rows = ["text,category"] + [f"where is my {n} card,{'abc'[n % 3]}" for n in range(60)]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    problem = TextProblem("t-5", str(bert_dir), tmp_path / "train.csv", tmp_path / "train.csv", 5)
    first, again, other = (problem.load(seed, tmp_path / "work") for seed in (0, 0, 1))
    assert len(first.train) == 15
    assert set(first.train.dataset.samples).isdisjoint(first.validation.dataset.samples)
    assert first.train.dataset.samples == again.train.dataset.samples != other.train.dataset.samples


def test_a_file_with_other_columns_is_refused(tmp_path, bert_dir):
    (tmp_path / "t.csv").write_text("text,label,more\na,b,c\n")
    problem = TextProblem("t-5", str(bert_dir), tmp_path / "t.csv", tmp_path / "t.csv", 5)
    with pytest.raises(DataError, match="expected text and one other"):
        problem.load(0, tmp_path)


def test_pages_are_turned_with_their_classes():
    train, validation, test = segmentation.user_pages(0)
    assert len(train), len(test) == (200, 300)
    ink = 1 - train.images[:, 0]  # the user's device inverts: ink is dark in the page again
    for page in range(5):
        inked = train.classes[page] > 0
        assert ink[page][inked].min() >= segmentation._INK / 16 - 1e-6
    assert not np.array_equal(train.images[0], validation.images[0])


def test_dice_is_one_for_a_model_that_knows_and_low_for_one_that_does_not():
    pages, _, _ = segmentation.user_pages(0)

    class Oracle(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.seen, self.shift = 0, shift

        def forward(self, pixel_values):
            count = len(pixel_values)
            truth = torch.from_numpy(pages.classes[self.seen : self.seen + count])
            self.seen += count
            return torch.nn.functional.one_hot((truth + self.shift) % 11, 11).movedim(-1, 1).float()

    assert segmentation.mean_dice(Oracle(0), pages, segmentation.TASK) == pytest.approx(1.0)
    assert segmentation.mean_dice(Oracle(1), pages, segmentation.TASK) < 0.1


def test_the_command_runs_a_small_grid_and_resumes(tmp_path):
    out = tmp_path / "comparison"
    command = [
        "compare",
        "--problem",
        "digits",
        "--epochs",
        "1",
        "--method",
        "gradient-r8",
        "--method",
        "head",
    ]
    command += ["--seeds", "1", "--workers", "2", "--out", str(out), "--json"]
    first = CliRunner().invoke(edge_tcur, command)
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)
    assert {row["method"] for row in result["rows"]} == {"gradient-r8", "head"}
    assert (out / "comparison.png").stat().st_size > 10_000
    before = (out / "records.jsonl").read_bytes()
    again = CliRunner().invoke(edge_tcur, command)
    assert json.loads(again.stdout)["rows"] == result["rows"]
    assert (out / "records.jsonl").read_bytes() == before


def test_without_a_problem_the_command_says_what_to_name():
    result = CliRunner().invoke(edge_tcur, ["compare", "--json"])
    assert isinstance(result.exception, UsageError)


def test_the_methods_can_be_listed():
    result = CliRunner().invoke(edge_tcur, ["compare", "--list", "--json"])
    assert set(json.loads(result.stdout)["methods"]) == set(METHODS)


def test_the_tables_of_the_documentation_are_those_of_its_records():
    """docs/results.md holds what `markdown` makes of docs/data/quality, and names no other table."""
    docs = Path(__file__).parents[2] / "docs"
    tables = markdown(summarize(read_records(docs / "data" / "quality")))
    assert tables == (docs / "data" / "quality" / "tables.md").read_text(encoding="utf-8")
    text = (docs / "results.md").read_text(encoding="utf-8")
    assert tables in text
    assert "| method | score" not in text.replace(tables, "")


ORPHANS = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from edge_tcur.compare.runner import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300)
    time.sleep(300)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        for _ in range(100):
            if not Path(f"/proc/{worker}").exists() or "Z (" in _state(worker):
                return
            time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def _state(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "Z ("
