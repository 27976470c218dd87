"""The E2E challenge's metrics: its scorer's golden scores, small cases worked out by hand, and what
scores must satisfy.
"""

import gzip
import math
import random

import pytest

import weft
from weft.tasks import caption_scores as captions
from weft.tasks import e2e
from weft.tasks.generation import references_only
from weft.tasks.ngram_scores import bleu, nist
from weft.tasks.scoring import score_files

GOLDEN = {
    "example": (
        "example_outputs.txt.gz",
        "example_refs.txt.gz",
        (0.7203, 7.7889, 0.4801, 0.7910, 2.3039),
    ),
    "tgen": ("tgen_std_run0.txt.gz", "test_refs.txt.gz", (0.6616, 8.5446, 0.4504, 0.6914, 2.2312)),
}
needs_java = pytest.mark.skipif(
    not captions.has_java(), reason="METEOR and Stanford's tokenizer need Java"
)

OUTPUTS = [
    "The Mill is a cheap pub near Café Rouge.",
    "Aromi serves Chinese food by the riverside.",
    "Alimentum is not family-friendly. It costs £20-25.",
]
GROUPS = [
    ["The Mill is a low-cost pub by Café Rouge.", "Near Café Rouge is The Mill, a cheap pub."],
    ["Aromi serves Chinese food at the riverside."],
    [
        "Alimentum isn't family friendly, and is £20-25.",
        "It costs £20-25 at Alimentum.",
        "Alimentum is not for kids.",
    ],
]


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(captions, "has_java", lambda: False)


def golden(shared, name):
    folder = shared / "data" / "datasets" / "E2E" / "scorer"
    outputs, references, wanted = GOLDEN[name]
    return folder / references, folder / outputs, dict(zip(e2e.METRICS, wanted, strict=True))


def check_golden(found, wanted, names):
    for name in names:
        assert found[name] == pytest.approx(wanted[name], rel=0.005), name


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN)
def test_scores_are_the_official_scorers_without_java(shared, without_java, name):
    references, outputs, wanted = golden(shared, name)
    report = score_files("e2e", references, outputs)
    check_golden(report.scores, wanted, ("BLEU", "NIST", "ROUGE-L", "CIDEr"))
    assert report.scores["METEOR"] is None and "Java" in report.reasons["METEOR"]
    assert "nltk" in report.notes[0]


@pytest.mark.shared
@needs_java
@pytest.mark.parametrize("name", ["example", pytest.param("tgen", marks=pytest.mark.slow)])
def test_all_five_scores_are_the_official_scorers(shared, name):
    references, outputs, wanted = golden(shared, name)
    report = score_files("e2e", references, outputs)
    check_golden(report.scores, wanted, e2e.METRICS)
    assert report.reasons == {} and report.notes == ()


@pytest.mark.shared
@needs_java
def test_tokens_without_java_are_those_of_stanfords_tokenizer(shared):
    folder = shared / "data" / "datasets" / "E2E"
    text = "\n".join(
        gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.rglob("*.txt.gz"))
    )
    lines = list(
        dict.fromkeys(line.rpartition("||")[2].strip() for line in text.split("\n") if line.strip())
    )
    lines = lines[::4]
    assert len(lines) > 2000
    assert captions.tokenize(lines, java=True) == captions.tokenize(lines, java=False)


def test_bleu_of_a_case_worked_out_by_hand():
    # the cat sat on the mat | the cat sat on a mat: 5/6 words, 3/5 pairs, 2/4 triples, 1/3 fours;
    # equal lengths
    found = bleu(["The cat sat on the mat"], [["the cat sat on a mat"]])
    assert found == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two():
    # 4 tokens against references of 5 and 3 tokens: 3 is as close and shorter, so there is no
    # penalty
    assert bleu(["a b c d"], [["a b c d e", "x y z"]]) == pytest.approx(1.0)
    assert bleu(["a b c d"], [["a b c d e f"]]) == pytest.approx(math.exp(1 - 6 / 4))


def test_bleu_of_short_and_empty_outputs_is_the_official_python_scorers():
    # "a b" and "": 2 + 1 tokens (an empty output counts one), 3 - 2 pairs, 3 - 4 and 3 - 6 longer
    # ones, taken as 1e-9
    wanted = math.exp(1 - 6 / 3) * (2 / 3 * 1 / 1 * (1e-15 / 1e-9) ** 2) ** 0.25
    assert bleu(["a b", ""], [["a b c d"], ["e f"]]) == pytest.approx(wanted)


def test_nist_of_a_case_worked_out_by_hand():
    # References: "a b" and "a c", 4 words. info(a) = log2(4/2) = 1, info(b) = log2(4/1) = 2, info(a
    # b) = log2(2/1) = 1. Output "a b" twice: words 1 + 2 (first) and 1 (second, b is not in its
    # reference); pairs 1 of 2; no longer places.
    assert nist(["a b", "a b"], [["a b"], ["a c"]]) == pytest.approx((1 + 2 + 1) / 4 + 1 / 2)


def test_nist_clips_hits_against_all_references_together_and_compares_with_their_mean_length():
    # a and b come from different references; nltk would take only one of the two. 2 words against a
    # mean of 2.
    found = nist(["a b"], [["a x", "y b"]])
    assert found == pytest.approx((math.log2(4) + math.log2(4)) / 2)
    short = nist(["a"], [["a x", "y b"]])
    beta = -math.log(0.5) / math.log(1.5) ** 2
    assert short == pytest.approx(math.log2(4) * math.exp(-beta * math.log(0.5) ** 2))


def test_rouge_l_and_cider_of_cases_worked_out_by_hand(without_java):
    # Longest common subsequence of "the cat sat" and "the cat ran off": 2 words; P 2/3, R 2/4, beta
    # 1.2
    report = captions.caption_scores(
        ["The cat sat.", "A dog."], [["the cat ran off"], ["a dog", "a big dog"]]
    )
    precision, recall = 2 / 3, 2 / 4
    first = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert report.scores["ROUGE-L"] == pytest.approx(
        (first + 1.0) / 2
    )  # best precision and best recall are taken apart
    # Two segments of two words, nothing shared: cosine 1 for words and pairs, none of longer ones:
    # so 10 (1 + 1 + 0 + 0) / 4.
    report = captions.caption_scores(["a dog", "my cat"], [["a dog"], ["my cat"]])
    assert report.scores["CIDEr"] == pytest.approx(5.0)


def test_identical_outputs_score_as_high_as_can_be(without_java):
    texts = [group[0] for group in GROUPS]
    scores = e2e.score_e2e(texts, references_only(GROUPS)).scores
    assert scores["BLEU"] == pytest.approx(1.0) and scores["ROUGE-L"] == pytest.approx(1.0)
    alone = e2e.score_e2e(texts, references_only([text] for text in texts)).scores
    assert alone["CIDEr"] == pytest.approx(10.0)
    worse = e2e.score_e2e(OUTPUTS, references_only(GROUPS)).scores
    for name in ("BLEU", "NIST", "ROUGE-L", "CIDEr"):
        assert scores[name] > worse[name] > 0, name


def test_the_order_of_references_and_of_segments_changes_nothing(without_java):
    wanted = e2e.score_e2e(OUTPUTS, references_only(GROUPS)).scores
    for seed in range(3):
        draw = random.Random(seed)
        order = draw.sample(range(3), 3)
        groups = [draw.sample(GROUPS[i], len(GROUPS[i])) for i in order]
        found = e2e.score_e2e([OUTPUTS[i] for i in order], references_only(groups)).scores
        assert {k: pytest.approx(v) if v is not None else None for k, v in wanted.items()} == found


def test_case_and_quotes_of_another_kind_are_read_as_stanfords_tokenizer_reads_them():
    said = captions.tokenize(
        ["It ’s the “Mill” – St. Mary 's pub, e.g. at £20.", "Don't go. 20- or 'Tis"], java=False
    )
    assert said[0] == "it 's the mill st. mary 's pub e.g. at # 20"
    assert said[1].startswith("do n't go 20 or")


@needs_java
@pytest.mark.slow
def test_meteor_is_one_for_identical_text_and_blind_to_order_and_counts_empty_outputs():
    def meteor(outputs, groups):
        return captions.caption_scores(outputs, groups).scores["METEOR"]

    wanted = meteor(OUTPUTS, GROUPS)
    assert 0.2 < wanted < 1
    assert meteor([group[0] for group in GROUPS], GROUPS) == pytest.approx(1.0)
    assert meteor(OUTPUTS[::-1], [group[::-1] for group in GROUPS[::-1]]) == pytest.approx(wanted)
    assert 0 < meteor([OUTPUTS[0], "", OUTPUTS[2]], GROUPS) < wanted


@needs_java
def test_a_java_that_fails_is_reported_and_the_other_scores_are_there(monkeypatch):
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.METEOR_JAR", "no-such.jar")
    report = captions.caption_scores(OUTPUTS, GROUPS)
    assert report.scores["METEOR"] is None and "Java program stopped" in report.reasons["METEOR"]
    assert report.scores["ROUGE-L"] > 0


def write(folder, references, outputs):
    paths = folder / "refs.txt", folder / "outs.txt"
    for path, text in zip(paths, (references, outputs), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_reference_files_of_all_forms_hold_the_same(tmp_path):
    grouped, _ = write(tmp_path, "a\nb\n\nc\n\n", "")
    table = tmp_path / "refs.csv"
    table.write_text('mr,ref\n"name[X], food[Y]",a\n"name[X], food[Y]",b\nname[Z],c\n')
    bars = tmp_path / "bars.txt"
    bars.write_text("name : X||a\nname : X||b\nname : Z||c\n")
    packed = tmp_path / "refs.txt.gz"
    packed.write_bytes(gzip.compress(grouped.read_bytes().replace(b"\n", b"\r\n")))
    for path in (grouped, table, bars, packed):
        assert e2e.read_e2e_references(path)[0] == [["a", "b"], ["c"]], path
    single = tmp_path / "single.txt"
    single.write_text("a\nb\n")
    assert e2e.read_e2e_references(single)[0] == [["a"], ["b"]]
    outputs = tmp_path / "outs.csv"
    outputs.write_text('mr,output\nname[Z],3\n"name[X], food[Y]",1\n')
    assert e2e.read_e2e_outputs(outputs, e2e.read_e2e_references(table)[1]) == ["1", "3"]


@pytest.mark.parametrize(
    ("references", "outputs", "said"),
    [
        ("a\n\nb\n", "x\n", "has 1 outputs, and .* has 2 references"),
        (
            "a\nb\n",
            "x\ny\n\n",
            "has 3 outputs, and .* has 2 references.*last 1 of the outputs are empty",
        ),
        ("a\n\n\nb\n", "x\ny\n", "line 3: an empty line ends a segment"),
        ("\n", "x\n", "it has no reference"),
        ("name : X||a\nname : Y||\n", "x\ny\n", "line 2: .* is not MEANING"),
    ],
)
def test_files_at_fault_are_refused(tmp_path, references, outputs, said):
    with pytest.raises(weft.WeftError, match=said):
        score_files("e2e", *write(tmp_path, references, outputs))


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    references, outputs = write(tmp_path, "a\n", "x\n")
    references.write_bytes(b"\xff\x00a")
    with pytest.raises(weft.WeftError, match="UTF-8"):
        score_files("e2e", references, outputs)
    with pytest.raises(weft.ConfigError, match="no such file"):
        score_files("e2e", tmp_path / "nothing.txt", outputs)
    bad = tmp_path / "refs.txt.gz"
    bad.write_bytes(b"plain")
    with pytest.raises(weft.WeftError, match="not a gzip file"):
        score_files("e2e", bad, outputs)
    with pytest.raises(weft.ConfigError, match="Nearest: e2e"):
        score_files("e2", references, outputs)
