"""Protocols, rows, means and ranges."""

from __future__ import annotations

import hashlib
import json
import statistics

import pytest

from reports import build_report
from reports.loading import find_runs
from reports.protocols import group_runs
from reports.settings import Family, differences
from robuq_bench.errors import CheckpointError


@pytest.fixture
def fabricate(fabricate):
    """Without pictures, which no test here looks at."""
    fabricate.pictures = False
    return fabricate


def groups_of(fabricate):
    return group_runs(find_runs([fabricate.root]).runs)


def records_of(path):
    return [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def test_mean_and_range_over_training_seeds_and_seed_ranges(fabricate):
    paths = [fabricate.run("a4", seed) for seed in (0, 1, 2)]
    expected = [
        r["fid_digits"] for p in paths for r in records_of(p) if r.get("subject") == "student"
    ]
    (group,) = groups_of(fabricate)
    (row,) = group.rows
    found = group.found(row, "fid_digits")
    assert found.mean == pytest.approx(statistics.mean(expected), rel=1e-14)
    assert (found.low, found.high) == (min(expected), max(expected))
    counts = group.summary.loc[("a4", "fid_digits")]
    assert (counts["values"], counts["training_seeds"], row.seeds) == (9, 3, [0, 1, 2])
    assert group.found(row, "no_such_metric") is None


def test_the_teachers_copied_values_count_once(fabricate):
    for plan in ("a4", "a3", "a2"):
        fabricate.run(plan)
    (group,) = groups_of(fabricate)
    assert group.summary.loc[("teacher", "fid_digits"), "values"] == 3
    assert group.values[group.values["plan"] == "teacher"]["seed"].isna().all()


def test_a_teacher_is_paired_by_training_seed_where_each_has_images_of_its_own(fabricate):
    own = ("evaluation.seed_ranges=1", "evaluation.image_seeds=own")
    for seed in (0, 1, 2):
        fabricate.run("a4", seed, overrides=own)
    (group,) = groups_of(fabricate)
    values = group.values[group.values["metric"] == "fid_digits"]
    for plan in ("teacher", "a4"):
        assert values.loc[values["plan"] == plan, "seed"].tolist() == [0, 1, 2]
    assert group.seed_starts == [0, 1000, 2000]


def test_the_teacher_row_cites_the_run_that_measured_it(fabricate):
    a4 = fabricate.run("a4", finish=False)
    records = records_of(a4)
    teachers = [record for record in records if record.get("subject") == "teacher"]
    measured = fabricate.run("fp", study="teacher-eval", records=teachers)
    for record in teachers:
        record["source_run"] = f"teacher-eval/{measured.name}"
    fabricate.run("a4", 1, records=records)
    (group,) = groups_of(fabricate)
    assert [run.id for run in group.teacher.runs] == [f"teacher-eval/{measured.name}"]


def test_the_full_precision_plan_is_the_teacher_row_and_adds_its_losses(fabricate):
    fabricate.run("fp")
    fabricate.run("a4")
    (group,) = groups_of(fabricate)
    assert [row.name for row in group.rows] == ["a4"]
    assert group.found(group.teacher, "distillation_loss").mean == 0
    assert group.summary.loc[("teacher", "fid_digits"), "values"] == 3


def test_a_full_precision_plan_with_other_values_keeps_its_own_row(fabricate):
    fabricate.run("a4")
    fabricate.run("fp", fid=9.9)
    (group,) = groups_of(fabricate)
    assert {row.name for row in group.rows} == {"a4", "fp"}


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.num_samples=500",
        "evaluation.sampler=ddpm",
        "evaluation.sampling_steps=50",
        "evaluation.timestep_spacing=fractional",
        "evaluation.cfg_scale=4.0",
        "evaluation.seed_ranges=2",
        "model.depth=5",
    ],
)
def test_runs_of_different_protocols_are_never_in_one_table(fabricate, override):
    fabricate.run("a4")
    fabricate.run("a4", overrides=[override])
    groups = groups_of(fabricate)
    assert [len(group.rows) for group in groups] == [1, 1]
    key = override.split("=")[0].removeprefix("evaluation.")
    assert all(key in group.title for group in groups)
    assert groups[0].protocol != groups[1].protocol or key == "model.depth"


def test_runs_of_two_versions_of_the_study_are_never_in_one_table(fabricate):
    """KID of version 1 is biased low: it neither stands beside version 2 nor leads."""
    for seed, plan in enumerate(("a8", "a4", "a3")):
        fabricate.run(plan, seed, version="1")
    fabricate.run("a4", 1, version="2")
    fabricate.run("a4", 2, version="10")
    groups = groups_of(fabricate)
    assert [(group.version, len(group.rows)) for group in groups] == [(10, 1), (2, 1), (1, 3)]
    assert all(f"study_version = {group.version}" in group.title for group in groups)


@pytest.mark.parametrize(("version", "notes"), [("1", 1), ("2", 0)])
def test_a_low_kid_of_version_1_is_said_once(fabricate, tmp_path, version, notes):
    fabricate.run("a4", version=version)
    fabricate.run("a4", version=version, overrides=["evaluation.num_samples=500"])
    html = build_report([fabricate.root], tmp_path / "report.html").read_text()
    assert html.count("KID of version 1 of the study is biased low") == notes


@pytest.mark.parametrize("override", ["evaluation.batch_size=10", "evaluation.grid_images=20"])
def test_settings_that_change_no_number_do_not_split_a_protocol(fabricate, override):
    fabricate.run("a4")
    fabricate.run("a3", overrides=[override])
    (group,) = groups_of(fabricate)
    assert len(group.rows) == 2


def test_one_plan_with_two_budgets_has_two_rows_that_say_so(fabricate):
    fabricate.run("a4", overrides=["training.steps=700"])
    fabricate.run("a4", 1, overrides=["training.steps=700"])
    fabricate.run("a4", overrides=["training.steps=900"])
    (group,) = groups_of(fabricate)
    assert [(row.label, row.seeds) for row in group.rows] == [
        ("a4 (training.steps = 700)", [0, 1]),
        ("a4 (training.steps = 900)", [0]),
    ]


def test_labels_say_ptq_and_trained_rows_come_first(fabricate):
    fabricate.run("a4", overrides=["train.steps=0"])
    fabricate.run("a4")
    fabricate.run("rtn-w4a4")
    (group,) = groups_of(fabricate)
    labels = [row.label for row in group.rows]
    assert labels[0].startswith("a4 (train.steps = not set")
    assert labels[1].startswith("a4 (PTQ, train.steps = ")
    assert labels[2:] == ["rtn-w4a4 (PTQ)"]
    assert [row.qat_steps for row in group.rows] == [500, 0, 0]


def test_metrics_of_two_sample_counts_in_one_run_are_refused(fabricate):
    records = records_of(fabricate.run("a4", finish=False))
    spoilt = [r | {"num_samples": 7} if r["key"] == "metrics/student/1" else r for r in records]
    path = fabricate.run("a4", 1, records=spoilt)
    with pytest.raises(CheckpointError, match=rf"{path.name}/results\.jsonl mixes"):
        groups_of(fabricate)


def test_families_are_read_from_settings_and_rows_go_from_many_bits_to_few(fabricate):
    for plan in ("baseline-a2", "a2-uniform", "bitnetv2-a4", "a2", "a8"):
        fabricate.run(plan)
    (group,) = groups_of(fabricate)
    assert [(row.name, row.family, row.bits) for row in group.rows] == [
        ("a8", Family.UNIFORM, 8),
        ("bitnetv2-a4", Family.PARTIAL, 4),
        ("a2", Family.AMPN, 2),
        ("a2-uniform", Family.UNIFORM, 2),
        ("baseline-a2", Family.UNROTATED, 2),
    ]


def test_differences_name_keys_that_only_one_side_has():
    configs = [{"name": "x", "a": {"b": 1}}, {"name": "y"}, {"name": "x", "a": {"b": 1, "c": 2}}]
    assert differences(configs) == ["a.c = not set", "", "a.c = 2"]


def seal(path, manifest):
    text = json.dumps(manifest)
    (path / "manifest.json").write_text(text)
    (path / "DONE").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")


def with_inputs(path, **digests):
    """Rewrite a finished run's manifest as if it had recorded these inputs."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["inputs"] = {name: {"sha256": digest} for name, digest in digests.items()}
    seal(path, manifest)


@pytest.mark.parametrize("name", ["data", "features", "reference", "vae"])
def test_runs_on_other_inputs_are_never_compared(fabricate, name):
    for plan, digest in (("a4", "a" * 64), ("a3", "a" * 64), ("a2", "b" * 64)):
        with_inputs(fabricate.run(plan), **{name: digest})
    groups = groups_of(fabricate)
    assert [[row.name for row in group.rows] for group in groups] == [["a4", "a3"], ["a2"]]
    assert "aaaaaaaa" in groups[0].differs
    assert "bbbbbbbb" in groups[1].differs


def test_a_run_of_before_the_digests_stands_beside_later_ones_of_its_version(fabricate):
    """What a run recorded of its data counts, whether or not its config names it.

    An optional field comes without a new version; of another version, nothing may stand beside.
    """
    known = {"data": "a" * 64, "features": "b" * 64}
    stated = f"data.sha256={'a' * 64}"
    with_inputs(fabricate.run("a4", version="1"), **known)
    with_inputs(fabricate.run("a3", version="1", overrides=[stated]), **known)
    with_inputs(fabricate.run("a8", version="2", overrides=[stated]), **known)
    old = fabricate.run("a2", version="1")
    lines = (old / "config.toml").read_text().splitlines()
    newer = ('sha256 = "none"', "features_sha256", "adapt_images", "reference_s", "vae_s", "second")
    text = "\n".join(line for line in lines if not line.startswith(newer)) + "\n"
    assert len(text.splitlines()) == len(lines) - 9
    (old / "config.toml").write_text(text)
    manifest = json.loads((old / "manifest.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["outputs"]["config.toml"] = {"sha256": digest, "bytes": len(text)}
    seal(old, manifest)
    with_inputs(old, **known)
    newest, first = groups_of(fabricate)
    assert [row.name for row in newest.rows] == ["a8"]
    assert [row.name for row in first.rows] == ["a4", "a3", "a2"]
