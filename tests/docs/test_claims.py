"""scripts/claims.py: what its measures say of matrices whose answer is known, how a verdict falls,
and how it is printed.
"""

import json
import re

import claims
import docs_claims
import pytest
import torch
from documents import DOCS


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_low_rank_matrix_has_all_its_norm_in_few_directions():
    update = random(12, 2) @ random(2, 9, seed=1)
    assert claims._share(update, 2) == pytest.approx(1) and claims._share(update, 1) < 1
    s = torch.tensor([4.0, 2, 1], dtype=torch.float64)
    assert claims._share(torch.diag(s), 2) == pytest.approx(20 / 21)


def test_overlap_is_1_of_equal_spaces_0_of_orthogonal_ones_and_k_over_out_by_chance():
    update = random(12, 2) @ random(2, 9, seed=1)
    assert claims._overlap(update, update @ random(9, 9, seed=2), 2) == pytest.approx(
        1
    )  # other inputs, same outputs
    Q = torch.linalg.qr(random(12, 12, seed=3)).Q
    assert claims._overlap(Q[:, :2], Q[:, 2:4], 2) == pytest.approx(0, abs=1e-12)
    found = [
        claims._overlap(random(12, 9, seed=i), random(12, 9, seed=100 + i), 3) for i in range(200)
    ]
    assert sum(found) / 200 == pytest.approx(3 / 12, abs=0.02)


def test_cosines_of_orthogonal_and_of_equal_rows():
    assert claims._cosines(torch.linalg.qr(random(6, 6)).Q) == pytest.approx(0, abs=1e-12)
    assert claims._cosines(random(1, 6).repeat(3, 1)) == pytest.approx(1)


def test_the_two_vectors_have_as_many_degrees_of_freedom_as_the_formula_says():
    found = claims.freedom()
    assert [one.value for one in found] == [7 + 2 - 1, 16 + 4 - 1]
    assert {one.verdict for one in found} == {claims.NOT_SEEN} and all(
        one.interval is None for one in found
    )


@pytest.mark.parametrize(
    ("values", "least", "most"),
    [
        ([0.91, 0.92, 0.93], "seen", "not seen"),
        ([0.1, 0.11, 0.12], "not seen", "seen"),
        ([0.1, 0.5, 1.4], "cannot tell", "cannot tell"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(values, least, most):
    assert claims.at_least("", values, 0.8, "").verdict == least
    assert claims.at_most("", values, 0.8, "").verdict == most


def test_every_claim_stands_on_the_page_and_only_these():
    text = (DOCS / "claims.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- generated: claim (\S+) -->", text) == list(claims.CLAIMS)
    assert set(docs_claims.recorded()) <= set(claims.CLAIMS) == set(docs_claims.TITLES)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == [title for name, title in docs_claims.TITLES.items() if name != "noise"]


def test_a_claim_without_a_run_says_so_and_numbers_are_those_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_claims, "RECORD", tmp_path / "claims.json")
    assert docs_claims.claim("svd") == "Not run yet.\n"
    one = {
        "what": "|cos|",
        "value": 0.1234,
        "interval": [0.1, 0.2],
        "verdict": "seen",
        "rule": "at most 0.3",
    }
    (tmp_path / "claims.json").write_text(
        json.dumps(
            {
                "schema": 1,
                "claims": {
                    "svd": {
                        "command": "c",
                        "date": "d",
                        "machine": "m",
                        "rates": {"LoRA": 0.01},
                        "findings": [one, {**one, "interval": None}],
                    }
                },
            }
        )
    )
    text = docs_claims.claim("svd")
    assert (
        "| \\|cos\\| | 0.123 | 0.1 to 0.2 | at most 0.3 | seen |" in text
        and "| exact |" in text
        and "`c`, d, m." in text
    )
    assert docs_claims.claim("vera") == "Not run yet.\n"
