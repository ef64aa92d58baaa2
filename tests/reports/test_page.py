"""Tables and verdicts as the page prints them: nothing lost, nothing rounded to another meaning."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from reports.page import Claim, Figures, Section, Sheet, claims_sheet, evidence
from reports.text import bytes_text, percent, significant
from robuq_bench.statistics.verdicts import Verdict


def verdict(**changes: object) -> Verdict:
    values: dict[str, object] = {
        "claim": "AMPN beats uniform bits",
        "subject": "a2",
        "verdict": "undecided",
        "effect": 0.97,
        "effect_name": "ratio of fid_digits",
        "low": 0.9996,
        "high": 1.04,
        "n": 8,
        "n_of": "training seeds",
        "test": "paired t interval",
        "p_value": 0.2,
        "detectable": 0.94,
    }
    return Verdict(**{**values, **changes})  # type: ignore[arg-type]


def test_a_sheet_prints_every_value_once_by_its_format() -> None:
    frame = pd.DataFrame(
        {
            "plan": ["a2", "a4"],
            "bytes": [1228720.0, np.nan],
            "fid": [0.29821405, 12345678.0],
            "is_exact": [True, False],
            "run": ["#run-1", None],
            "range": ["[0.27–0.32]", None],
            "id": ["row-1", "row-2"],
        }
    )
    sheet = Sheet(
        frame, "Plans", formats={"bytes": bytes_text}, heads={"fid": "FID"},
        links={"plan": "run"}, small={"fid": "range"}, anchors="id",
    )  # fmt: skip
    assert sheet.columns == ["plan", "bytes", "fid", "is_exact"]
    assert [sheet.head(name) for name in sheet.columns] == ["plan", "bytes", "FID", "is_exact"]
    (first, cells), (second, others) = sheet.rows()
    assert (first, second) == ("row-1", "row-2")
    assert [cell.text for cell in cells] == ["a2", "1.17 MiB", "0.298", "True"]
    assert [cell.text for cell in others] == ["a4", "not run", "1.23e+07", "False"]
    assert (cells[0].href, others[0].href) == ("#run-1", "")
    assert (cells[2].small, others[2].small) == ("[0.27–0.32]", "")
    assert [cell.is_number for cell in cells] == [False, True, True, False]
    assert [cell.is_missing for cell in others] == [False, True, False, False]


def test_a_sheet_that_names_a_column_it_lacks_is_refused() -> None:
    frame = pd.DataFrame({"plan": ["a2"]})
    with pytest.raises(ValueError, match=r"table 'Plans' has no columns \['fid'\]"):
        Sheet(frame, "Plans", formats={"fid": str})


def test_latex_holds_what_the_page_prints_and_escapes_it() -> None:
    frame = pd.DataFrame({"plan_name": ["a_2 & more"], "share": [0.074]})
    text = Sheet(frame, "50 % of_it", formats={"share": lambda v: f"{100 * v:.1f} %"}).latex()
    for wanted in (r"\toprule", r"plan\_name & share", r"a\_2 \& more & 7.4 \%", r"50 \% of\_it"):
        assert wanted in text


def test_evidence_says_effect_interval_n_and_test_and_hides_no_side_of_one() -> None:
    text = evidence(verdict())
    assert text.startswith("ratio of fid_digits 0.970 [0.9996 to 1.0400]; n = 8 training seeds; ")
    assert "paired t interval" in text
    assert text.endswith("smallest effect that would have shown: 0.940")
    assert "would have shown" not in evidence(verdict(verdict="better", p_adjusted=0.01))
    assert evidence(verdict(verdict="better", p_adjusted=0.012)).endswith("adjusted p = 0.012")


def test_an_interval_is_printed_on_its_side_of_the_margin_and_around_its_effect() -> None:
    wide = verdict(effect=1.0, low=0.9698, high=1.02)
    assert "[0.9698 to 1.0200]" in evidence(wide)  # 0.97 is a limit of the rule
    assert "[1.049 to" in evidence(verdict(effect=1.06, low=1.0494, high=1.07), [1.05])
    near = verdict(effect=0.3461, low=0.3458, high=0.374, confidence=0.8)
    assert "0.346 [0.346 to 0.374] at 80 %" in evidence(near)


def test_a_verdict_without_numbers_says_only_what_there_is() -> None:
    bare = verdict(effect=None, low=None, high=None, n=0, detectable=None, test="recorded before")
    assert evidence(bare) == "recorded before"


def test_the_checklist_keeps_subject_and_note_and_links_the_run() -> None:
    claims = [Claim(verdict(note="differs in rank"), "digits", "#run-1")]
    claims.append(Claim(verdict(subject="AMPN"), "digits"))
    sheet = claims_sheet(claims, "Claims", "the rule")
    assert sheet.columns == ["claim", "verdict", "evidence"]
    (_, first), (_, second) = sheet.rows()
    assert (first[0].small, first[2].small, first[2].href) == ("a2", "differs in rank", "#run-1")
    assert second[0].small == ""  # the sentence names its subject


def test_a_key_needs_a_meaning_a_mark_and_words() -> None:
    figure = Figures(
        [], "by plan", [("rotated", "◆ Hadamard, AMPN bits"), ("neutral", "┆ teacher")]
    )
    assert figure.key_items() == [("blue", "◆", "Hadamard, AMPN bits"), ("neutral", "┆", "teacher")]
    for bad in (("rotatd", "◆ Hadamard"), ("rotated", "Hadamard")):
        with pytest.raises(ValueError, match="no key"):
            Figures([], "by plan", [bad]).key_items()


def test_only_headings_with_anchors_stand_in_the_contents() -> None:
    from reports.page import Heading

    section = Section("s", "S", [], [Heading("Cost", "cost"), Heading("Detail")])
    assert section.parts == [("cost", "Cost")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.5, "−0.500"), (1e-5, "1.00e−05"), (12.0, "12"), (0.99951, "1.00"),
     (float("nan"), "not finite"), (1228720.5, "1.23e+06")],
)  # fmt: skip
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_a_share_below_one_is_never_all() -> None:
    assert [percent(share) for share in (1.0, 2999 / 3000, 0.5, 0.0)] == [
        "100 %",
        "99.97 %",
        "50 %",
        "0 %",
    ]
