"""METEOR, ROUGE-L and CIDEr as the COCO caption scripts print them, from the package
`pycocoevalcap`.

METEOR 1.5 is a Java program (in the package); it needs a `java` on the PATH and is reported as
missing without one. All three read tokens of Stanford's PTB tokenizer, lower-cased and without
punctuation, which is Java too. Where there is no Java, ROUGE-L and CIDEr are computed all the same
on nltk's Treebank tokens, changed below to what Stanford's does, and a note says so. A test finds
no difference on the E2E challenge's references; addresses, tags and the like do differ.

We start Stanford's tokenizer ourselves: the package writes its temporary file into its own folder,
which a user often may not write to. Its scores are used as they are.
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
NO_JAVA = (
    "METEOR 1.5 is a Java program, and no `java` runs here: install a Java runtime (on Debian and "
    "Ubuntu: "
    "apt-get install default-jre-headless)."
)
NO_JAVA_TOKENS = (
    "ROUGE-L and CIDEr: tokens are nltk's, not those of Stanford's tokenizer, which needs Java; "
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


def caption_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Report:
    """METEOR and ROUGE-L in [0, 1], CIDEr in [0, 10]; the means over segments (METEOR: over all of
    them together).

    CIDEr weighs n-grams by the number of segments whose references have them, so one segment alone
    scores 0.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java = has_java()
    said = tokenize([*outputs, *(text for group in references for text in group)], java)
    found = {i: [text] for i, text in enumerate(said[: len(outputs)])}
    rest = iter(said[len(outputs) :])
    wanted = {i: [next(rest) for _ in group] for i, group in enumerate(references)}
    scores: Scores = dict.fromkeys(METRICS)
    reasons: dict[str, str] = {}
    if java:
        scores["METEOR"], failed = _meteor(wanted, found)
        reasons |= {"METEOR": failed} if failed else {}
    else:
        reasons["METEOR"] = NO_JAVA
    scores["ROUGE-L"] = float(Rouge().compute_score(wanted, found)[0])
    scores["CIDEr"] = float(Cider().compute_score(wanted, found)[0])
    return Report(scores, reasons, () if java else (NO_JAVA_TOKENS,))


@cache
def has_java() -> bool:
    """There is a `java` on the PATH and it runs (on a Mac without a runtime, one is there and does
    not).
    """
    java = shutil.which("java")
    return (
        java is not None
        and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0
    )


def tokenize(texts: Sequence[str], java: bool) -> list[str]:
    """Tokens, lower-cased, without punctuation, joined by single spaces: one string for each
    text.
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
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise WeftError(
            f"Stanford's tokenizer (Java) failed on {len(lines)} lines: "
            f"{said[-1] if said else 'no message'}"
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
    """The score, or None and why there is none (too little memory for Java, above all: it asks for
    2 GB).
    """
    from pycocoevalcap.meteor.meteor import Meteor

    scorer: Any = Meteor()
    try:
        return float(scorer.compute_score(wanted, found)[0]), ""
    except (
        OSError,
        ValueError,
    ):  # the program is gone: a broken pipe, or an empty line where a number should be
        scorer.meteor_p.kill()
        said = scorer.meteor_p.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return None, f"METEOR's Java program stopped: {said[-1] if said else 'no message'}"
    finally:
        scorer.lock.locked() and scorer.lock.release()
        with suppress(
            OSError
        ):  # what a dead program has not read; the library closes it again, in its destructor
            scorer.meteor_p.stdin.close()
        scorer.meteor_p.stdout.close()
        scorer.meteor_p.stderr.close()
