"""METEOR, ROUGE-L and CIDEr as in the COCO caption scripts, from the package `pycocoevalcap`.

METEOR 1.5 is a Java program in the package. It needs `java` on the PATH and is reported as missing
without it. All three metrics read tokens of Stanford's PTB tokenizer, lower-cased and without
punctuation, which is a Java program too. Without Java, ROUGE-L and CIDEr are computed on nltk's
Treebank tokens, adapted below to Stanford's, and a note says this. A test finds no difference on
the E2E challenge's references; addresses and tags do differ.

Stanford's tokenizer is started here, because the package writes its temporary file into its own
folder, where users often have no write access. Its scores are used unchanged.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .generation import Report, Scores

METRICS = ("METEOR", "ROUGE-L", "CIDEr")
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
NO_JAVA = (
    "METEOR 1.5 is a Java program, and `java` does not run: install a Java runtime (on Debian and "
    "Ubuntu: "
    "apt-get install default-jre-headless)."
)
NO_JAVA_TOKENS = (
    "ROUGE-L and CIDEr: tokens are nltk's instead of Stanford's, whose tokenizer needs Java; "
    "the scores "
    "can differ in the fourth digit."
)
# In this order: signs that Stanford's tokenizer writes otherwise; a full stop that ends no
# abbreviation; a full stop, dash or quote that belongs to no word.
_ABBREVIATION = r"(?:St|Mr|Mrs|Ms|Dr|Jr|Sr|vs|etc|e\.g|i\.e|[ap]\.m|[a-z](?:\.[a-z])*)\.(?=\s)"
_LIKE_STANFORD = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        ("£", " # "),
        ("€", " $ "),
        ("[‘’]", "'"),
        ("[“”]", '"'),
        ("[–—]", " -- "),
        (r"…|\.{2,}", " ... "),
        (rf"(?<!\S)(?!{_ABBREVIATION})(\S*[^\s.])\.(?=[\s'\")\]]|$)", r"\1 ."),
        (r"(?<!\S)\.(?=\w)", ". "),
        (r"(?<=\w)-(?=\s|$)", " -"),
        (r"(?<!\S)-(?=[a-z])", "- "),
        (r"(?<!\S)'(?!(?:s|m|d|ll|re|ve)\b)(?=\w)", "' "),
    )
)


def caption_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], bleu: bool = False
) -> Report:
    """Returns METEOR and ROUGE-L in [0, 1], and CIDEr in [0, 10]; with `bleu` also BLEU-1 to BLEU-4
    in [0, 1], of the same tokens.

    ROUGE-L and CIDEr are means over segments; METEOR is computed over all of them. CIDEr weighs
    n-grams by the number of segments whose references have them, so a single segment scores 0.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java = has_java()
    output = tokenize([*outputs, *(text for group in references for text in group)], java)
    found = {i: [text] for i, text in enumerate(output[: len(outputs)])}
    rest = iter(output[len(outputs) :])
    wanted = {i: [next(rest) for _ in group] for i, group in enumerate(references)}
    scores: Scores = dict(zip(BLEU, _bleu(wanted, found), strict=True)) if bleu else {}
    scores |= dict.fromkeys(METRICS)
    reasons: dict[str, str] = {}
    if java:
        scores["METEOR"], failed = _meteor(wanted, found)
        reasons |= {"METEOR": failed} if failed else {}
    else:
        reasons["METEOR"] = NO_JAVA
    scores["ROUGE-L"] = float(Rouge().compute_score(wanted, found)[0])
    scores["CIDEr"] = float(Cider().compute_score(wanted, found)[0])
    return Report(scores, reasons, () if java else (NO_JAVA_TOKENS,))


def _bleu(wanted: dict[int, list[str]], found: dict[int, list[str]]) -> list[float]:
    from pycocoevalcap.bleu.bleu import Bleu

    scores, _ = Bleu(len(BLEU)).compute_score(wanted, found, verbose=0)
    return [float(score) for score in scores]


@cache
def has_java() -> bool:
    """Returns True if `java` is on the PATH and runs. (A Mac without a runtime has a `java` that
    does not.)
    """
    java = shutil.which("java")
    return (
        java is not None
        and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0
    )


def tokenize(texts: Sequence[str], java: bool) -> list[str]:
    """Returns one string per text: lower-case tokens without punctuation, joined by
    single spaces.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [" ".join(text.split()) for text in texts]
    split = _stanford(lines) if java else [_treebank(line) for line in lines]
    return [" ".join(token for token in tokens if token not in PUNCTUATIONS) for tokens in split]


def _stanford(lines: Sequence[str]) -> list[list[str]]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "lines.txt")
        given.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = [
            "java",
            "-cp",
            str(jar),
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
            str(given),
        ]
        done = subprocess.run(command, capture_output=True, check=False)
    tokens = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode or len(tokens) != len(lines):
        output = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise WeftError(
            f"Stanford's tokenizer (Java) failed on {len(lines)} lines: "
            f"{output[-1] if output else 'no message'}"
        )
    return [line.split() for line in tokens]


def _treebank(line: str) -> list[str]:
    from nltk.tokenize import TreebankWordTokenizer

    for pattern, instead in _LIKE_STANFORD:
        line = pattern.sub(instead, line)
    return [
        token.lower() for token in TreebankWordTokenizer().tokenize(line, convert_parentheses=True)
    ]


def _meteor(wanted: dict[int, list[str]], found: dict[int, list[str]]) -> tuple[float | None, str]:
    """The score, or None and the reason. The usual one is too little memory: Java needs 2 GB."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer: Any = Meteor()
    try:
        return float(scorer.compute_score(wanted, found)[0]), ""
    except (
        OSError,
        ValueError,
    ):  # the program ended: a broken pipe, or an empty line instead of a number
        scorer.meteor_p.kill()
        output = scorer.meteor_p.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return None, f"METEOR's Java program stopped: {output[-1] if output else 'no message'}"
    finally:
        scorer.lock.locked() and scorer.lock.release()
        with suppress(
            OSError
        ):  # input that the program has not read; the library closes the pipe again in its destructor
            scorer.meteor_p.stdin.close()
        scorer.meteor_p.stdout.close()
        scorer.meteor_p.stderr.close()
