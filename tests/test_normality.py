"""`study normality` from capture to tables: live, from saved activations, resumed, in training."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from robuq_bench.cli import app as cli
from robuq_bench.config import Config, resolve
from robuq_bench.context import Context
from robuq_bench.errors import CheckpointError, ConfigError, MissingResourceError, UsageError
from robuq_bench.normality import evidence, judgements
from robuq_bench.normality.capture import CapturedTokens, save_shard
from robuq_bench.normality.names import TRANSFORMS
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import read_verdicts
from studies.normality import parts
from studies.normality import study as normality

TINY = (
    "normality.images=16",
    "normality.timesteps=2",
    "normality.tokens_per_image=2",
    "normality.bootstrap_draws=100",
    "normality.control_tokens=16",
    "normality.control_widths=[36]",
    "normality.bound_tokens=5",
    "normality.bound_draws=200",
    "normality.decay_tokens=1",
    "normality.sign_draws=2",
    'normality.transforms=["identity","hadamard","randomized-hadamard","block-hadamard-64",'
    '"dual-rotation"]',
)


WORKLOAD: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def workload(tiny_workload: Path) -> None:
    WORKLOAD[:] = [tiny_workload]


def configure(*overrides: str, plan: str = "a4") -> Config:
    return resolve("normality", normality.VERSION, plan, WORKLOAD[0], 0, [*TINY, *overrides])


def context() -> Context:
    return Context(
        device="cpu", threads=torch.get_num_threads(), progress=Progress(quiet=True), argv=[]
    )


def perform(root: Path, config: Config) -> Run:
    with Run.open(root, config, []) as run:
        normality.measure(config, run, context())
        run.finish()
    return run


def table(run: Run, name: str) -> list[dict[str, str]]:
    text = (run.path / "tables" / f"{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def tables(run: Run) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run.path / "tables").glob("*.csv")}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, workload: None) -> Run:
    root = tmp_path_factory.mktemp("normality")
    return perform(root, configure("normality.save_activations=true"))


def once(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    @functools.cache
    def of(values: bytes) -> Any:
        return function(torch.frombuffer(bytearray(values), dtype=torch.float32))

    def remembering(token: Tensor) -> Any:
        assert token.dtype == torch.float32
        return of(token.numpy().tobytes())

    return remembering


ONCE = {name: once(getattr(evidence, name)) for name in ("distance_of_signs", "exact_distance")}


@pytest.fixture
def exact_distances_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They depend on the token alone, cost most of a small study, and have tests of their own."""
    for name, function in ONCE.items():
        monkeypatch.setattr(evidence, name, function)


def test_every_layer_timestep_and_transform_is_measured(live: Run) -> None:
    cells = table(live, "cells")
    assert {row["timestep"] for row in cells} == {"250", "750"}
    layers = {row["layer"] for row in cells}
    assert len(layers) == 10  # qkv, proj, fc1, fc2 and adaLN of two blocks
    for row in cells:
        expected = 16 if row["layer_type"] == "adaLN" else 32
        assert int(row["tokens"]) == expected
    by_transform = {
        name: [row for row in cells if row["transform"] == name]
        for name in ("identity", "hadamard", "randomized-hadamard", "dual-rotation")
    }
    assert all(len(rows) == 20 for rows in by_transform.values())
    reasons = {(row["transform"], row["width"]): row["reason"] for row in table(live, "skipped")}
    assert "multiple of 64, not 48" in reasons["block-hadamard-64", "48"]
    assert ("block-hadamard-64", "192") not in reasons


def test_the_positive_controls_are_rejected_and_the_null_is_not(live: Run) -> None:
    rows = {(row["control"], row["transform"]): row for row in table(live, "controls")}
    assert float(rows["gaussian", "identity"]["shapiro_rejected"]) < 0.2
    # 36 entries: heavy tails show in most tokens, and a one-hot token in all.
    assert float(rows["lognormal", "identity"]["shapiro_rejected"]) > 0.9
    assert float(rows["one-hot", "identity"]["shapiro_rejected"]) == 1
    assert float(rows["one-hot", "randomized-hadamard"]["shapiro_rejected"]) == 1


def test_numbers_agree_across_tables(live: Run) -> None:
    errors = {
        (row["layer_type"], row["width"], row["transform"], row["bits"]): row
        for row in table(live, "errors")
        if row["quantizer"] == "robust-midrise"
    }
    judgements = table(live, "judgements")
    assert len(judgements) == len(errors) > 100
    for row in judgements:
        source = errors[row["layer_type"], row["width"], row["transform"], row["bits"]]
        assert (row["lower_95"], row["upper_95"]) == (source["low"], source["high"])
        assert (row["verdict"] == "holds") == (float(source["high"]) < 1.05)
        assert (row["verdict"] == "does not hold") == (float(source["low"]) >= 1.05)
    for row in table(live, "bound"):
        assert row["violated"] == "False"
        assert float(row["exact_distance"]) < float(row["bound"])
    headline = [record for record in live.results() if record["kind"] == "normality"]
    assert {row["layer_type"] for row in headline} == {"qkv", "proj", "fc1", "fc2", "adaLN"}


def test_verdicts_are_the_judgements_in_words(live: Run) -> None:
    """The study's judgements are its only ones, and a report can read them without knowing it."""
    every = read_verdicts(pd.read_csv(live.path / "tables/verdicts.csv"))
    verdicts = [v for v in every if v.claim.startswith("Activations are normal enough")]
    judged = {
        (
            f"{row['subject']}, {row['transform']}, {row['layer_type']} ({row['width']})",
            row["bits"],
        ): row
        for row in table(live, "judgements")
    }
    assert len(verdicts) == len(judged)
    for verdict in verdicts:
        row = judged[verdict.subject, verdict.claim.split(" for ")[1].split()[0]]
        assert verdict.verdict == row["verdict"]
        assert (verdict.effect, verdict.low, verdict.high) == tuple(
            float(row[name]) for name in ("ratio", "lower_95", "upper_95")
        )
        assert (verdict.n, verdict.n_of) == (16, "images")
        assert f"{float(row['null_ratio']):.3f}" in verdict.note
        assert ("2 sign draws" in verdict.test) == bool(row["sign_draws"])
    assert "randomized-hadamard" in verdicts[0].subject
    outputs = [verdict for verdict in every if verdict not in verdicts]
    assert [verdict.subject for verdict in outputs] == [verdict.subject for verdict in verdicts]
    for verdict in outputs:
        row = judged[verdict.subject, verdict.claim.split(" for ")[1].split()[0]]
        assert verdict.claim.startswith("Activations are as good as normal in the output for ")
        assert verdict.verdict == row["output_verdict"]
        assert (verdict.effect, verdict.low, verdict.high) == tuple(
            float(row[f"output_{name}"]) for name in ("ratio", "lower_95", "upper_95")
        )


def test_output_errors_of_every_layer_and_timestep(live: Run) -> None:
    layers, types = table(live, "output_layers"), table(live, "output")
    assert len({row["layer"] for row in layers}) == 10
    key = ("layer_type", "width", "transform", "bits")
    for row in types:
        own = [r for r in layers if all(r[k] == row[k] for k in key)]
        assert len(own) == int(row["layers"]) == 2
        mean = sum(float(r["error"]) for r in own) / 2
        assert float(row["error"]) == pytest.approx(mean, rel=1e-9)
        drawn = {"hadamard": "", "randomized-hadamard": "2"}.get(row["transform"], "")
        assert row["sign_draws"] == drawn
    assert {row["timestep"] for row in table(live, "output_timesteps")} == {"250", "750"}
    shares = [float(row["share"]) for row in table(live, "constant")]
    assert len(shares) == 15  # ten layers, five types
    assert all(0 < share < 1 for share in shares)
    plain = [row for row in table(live, "judgements") if row["transform"] == "hadamard"]
    matrices = {"Sylvester 4 x Paley II 12", "Sylvester 16 x Paley II 12"}
    assert {row["matrix"] for row in plain} == matrices
    assert {row["matrix_draws"] for row in plain} == {"2"}


def test_too_few_images_are_not_judged() -> None:
    key = {"subject": "teacher", "layer_type": "qkv", "width": 48, "transform": "identity"}
    verdicts = judgements.verdicts([key | {"images": 12}], [])
    assert {(v.verdict, v.effect, v.n) for v in verdicts} == {("not judged", None, 12)}
    assert [v.claim.split(" for ")[1] for v in verdicts][:2] == ["1 bit", "2 bits"]


def test_saved_activations_give_the_same_numbers(live: Run, tmp_path: Path) -> None:
    folder = json.dumps(str(live.path / "activations"))
    again = perform(tmp_path, configure(f"normality.captured={folder}"))
    assert tables(again) == tables(live)
    links = tmp_path / "links"
    links.mkdir()
    (links / "linked").symlink_to(live.path / "activations")
    linked = perform(tmp_path, configure(f"normality.captured={json.dumps(str(links))}"))
    assert tables(linked) == tables(live)


@pytest.mark.usefixtures("exact_distances_once")
def test_a_killed_study_continues_to_the_same_tables(
    live: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("normality.save_activations=true")
    real, seen = normality.measure_tokens, []

    def dies_at_the_second(capture: Any, *args: Any) -> None:
        seen.append(capture.timestep)
        if len(seen) == 2:
            raise KeyboardInterrupt
        real(capture, *args)

    monkeypatch.setattr(normality, "measure_tokens", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        perform(tmp_path, config)
    monkeypatch.setattr(normality, "measure_tokens", real)
    analysed = []
    analyse = parts.analyse

    def counting(*args: Any, **kwargs: Any) -> Any:
        analysed.append(1)
        return analyse(*args, **kwargs)

    monkeypatch.setattr(parts, "analyse", counting)
    resumed = perform(tmp_path, config)
    assert tables(resumed) == tables(live)
    assert len(analysed) == len(table(live, "cells")) / 2  # only the second timestep


@pytest.mark.usefixtures("exact_distances_once")
def test_a_plan_in_the_middle_of_training(tmp_path: Path) -> None:
    config = configure(
        "normality.qat_steps=[0,2]", "training.batch_size=8", "normality.timesteps=1"
    )
    run = perform(tmp_path, config)
    types = table(run, "types")
    assert list(dict.fromkeys(row["subject"] for row in types)) == [
        "a4 after 0 steps",
        "a4 after 2 steps",
        "teacher",
    ]
    w = {
        row["subject"]: row["shapiro_w_median"]
        for row in types
        if row["layer_type"] == "fc2" and row["transform"] == "identity"
    }
    assert len(set(w.values())) == 3
    assert (run.checkpoint_folder / "training").is_dir()


@pytest.mark.usefixtures("exact_distances_once")
def test_bfloat16_shards_of_another_model(tmp_path: Path) -> None:
    """What a cluster would hand over: no calibration shard, half precision, foreign names."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, 64, generator=generator)
    tokens[:, 3] *= 20
    images = torch.arange(16).repeat_interleave(4)
    shard = {"transformer_blocks.0.ff.net.2": CapturedTokens(tokens.bfloat16(), images)}
    folder = tmp_path / "shards"
    save_shard(folder / "a.safetensors", shard, {"subject": "PixArt", "timestep": "100"})
    config = configure(f"normality.captured={json.dumps(str(folder))}")
    run = perform(tmp_path, config)
    (row,) = [r for r in table(run, "types") if r["transform"] == "identity"]
    assert (row["subject"], row["layer_type"], row["tokens"]) == ("PixArt", "fc2", "64")
    assert float(row["shapiro_w_median"]) < 0.8
    reasons = {row["transform"]: row["reason"] for row in table(run, "skipped")}
    assert "brings weights/<layer>" in reasons[parts.OUTPUT_ERROR]
    assert not (run.path / "tables" / "output.csv").exists()
    assert {row["layer"] for row in table(run, "constant")} == {"transformer_blocks.0.ff.net.2", ""}
    weight = {"transformer_blocks.0.ff.net.2": torch.randn(8, 64)}
    facts = {"subject": "PixArt", "timestep": "100"}
    save_shard(folder / "a.safetensors", shard, facts, weight)
    run = perform(tmp_path, configure(f"normality.captured={json.dumps(str(folder))}"))
    reasons = {row["transform"]: row["reason"] for row in table(run, "skipped")}
    assert "no calibration tokens" in reasons[parts.CENTRING]
    assert {row["layer_type"] for row in table(run, "output")} == {"fc2"}
    assert "centring_gain" not in table(run, "output")[0]


def test_unusable_activations_are_refused(tmp_path: Path) -> None:
    missing = json.dumps(str(tmp_path / "nowhere"))
    with pytest.raises(MissingResourceError, match=r"nowhere.*save_activations"):
        normality.check(configure(f"normality.captured={missing}"))
    folder = tmp_path / "shards"
    part = CapturedTokens(torch.randn(32, 16), torch.arange(16).repeat_interleave(2))
    save_shard(folder / "a.safetensors", {"x": part}, {"subject": "s"})
    config = configure(f"normality.captured={json.dumps(str(folder))}")
    with pytest.raises(CheckpointError, match="must name `subject` and `timestep`"):
        perform(tmp_path, config)
    few = CapturedTokens(torch.randn(32, 16), torch.arange(8).repeat_interleave(4))
    save_shard(folder / "a.safetensors", {"x": few}, {"subject": "s", "timestep": "5"})
    config = configure(f"normality.captured={json.dumps(str(folder))}")
    with pytest.raises(UsageError, match=r"8 images .* at least 16"):
        perform(tmp_path, config)


@pytest.mark.usefixtures("exact_distances_once")
def test_only_the_transforms_asked_for(tmp_path: Path) -> None:
    names = '["identity","randomized-hadamard"]'
    run = perform(tmp_path, configure(f"normality.transforms={names}", "normality.timesteps=1"))
    assert {row["transform"] for row in table(run, "types")} == {"identity", "randomized-hadamard"}
    with pytest.raises(ConfigError, match="'hadamar'; did you mean 'hadamard'"):
        configure('normality.transforms=["hadamar"]')


def test_too_small_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has 1797 images; .* = 2016"):
        perform(tmp_path, configure("normality.images=2000"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step-time", "--activations", "x"], "study step-time takes no --activations"),
        (["normality", "--checkpoint", "nothing"], "unknown run 'nothing'"),
        (["normality", "--shard", "1/2"], "study normality takes no --shard"),
        (["normality", "--set", "normality.imges=3"], "did you mean"),
        (["normality", "--set", "normality.images=3"], "normality: images"),
        (["normality", "--set", "normality.qat_steps=[5,1]"], "must ascend"),
        (["normality", "--set", 'normality.subjects=["student"]'], "--checkpoint RUN"),
        (["normality", "--set", 'normality.subjects=["techer"]'], "did you mean 'teacher'"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_activations_are_missing_data_even_when_dry(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["study", "normality", "--activations", "nowhere", "--dry-run"]) == 4
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.usefixtures("exact_distances_once")
def test_a_narrow_layer_is_left_out_and_listed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.arange(16).repeat_interleave(2)

    def layer(width: int, count: int = 32) -> CapturedTokens:
        return CapturedTokens(torch.randn(count, width), images[:count])

    layers = {"good": layer(36), "guidance_in": layer(1), "size_in": layer(7), "none": layer(36, 0)}
    for timestep in ("-1", "500"):
        save_shard(
            tmp_path / "d" / f"t{timestep}.safetensors",
            layers | {"eight": layer(8)},
            {"subject": "m", "timestep": timestep},
        )
    captured = f"normality.captured={json.dumps(str(tmp_path / 'd'))}"
    everything = f"normality.transforms={json.dumps(list(TRANSFORMS))}"
    run = perform(tmp_path / "runs", configure(captured, everything))
    assert {row["layer"] for row in table(run, "cells")} == {"good", "eight"}
    skipped = {
        row["layer_type"]: (row["width"], row["reason"])
        for row in table(run, "skipped")
        if row["transform"] == parts.EVERY_TRANSFORM
    }
    assert set(skipped) == {"guidance_in", "size_in", "none"}
    assert skipped["guidance_in"] == (
        "1", "guidance_in: no tokens of at least 8 inputs, which a test needs"
    )  # fmt: skip
    without_dc = {
        row["width"] for row in table(run, "cells") if row["transform"] == "hadamard-without-dc"
    }
    assert without_dc == {"36"}  # of 8 coordinates it leaves 7


def test_captures_of_narrow_layers_alone_are_refused(tmp_path: Path) -> None:
    images = torch.arange(16)
    tokens = CapturedTokens(torch.randn(16, 4), images)
    save_shard(tmp_path / "t.safetensors", {"a": tokens}, {"subject": "m", "timestep": "1"})
    captured = f"normality.captured={json.dumps(str(tmp_path))}"
    with pytest.raises(UsageError, match="no captured layer has tokens of 8 inputs"):
        perform(tmp_path / "runs", configure(captured))
