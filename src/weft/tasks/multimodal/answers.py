"""VQA accuracy: an answer is right to the degree that people gave it too.

Ten people answered each question. An answer scores min(1, n / 3), averaged over leaving out each of
the ten, for n equal answers among the other nine. Texts are normalised before they are compared,
and three tools that people quote differ in where they do so; the same output scores 0 in one and
100 in another ("two" against ten "2").

Sources: https://visualqa.org/evaluation.html; the code of GT-Vision-Lab/VQA (official), of
ylsung/VL_adapter (the VL-BART tables), and Pythia's EvalAIAnswerProcessor (TextVQA, VizWiz, LLaVA).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as the tools write it: "!<=" is no look-behind
_STOPS = int(re.UNICODE)  # the tools pass this flag as `count`: at most 32 full stops are removed
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS)}
# Words with an apostrophe that are recognised without one, or with one of their two.
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions(words: Sequence[str]) -> dict[str, str]:
    """Each word by its spellings in which one apostrophe is missing."""
    return {
        word[:i] + word[i + 1 :]: word for word in words for i, c in enumerate(word) if c == "'"
    }


# The official table has "Im" and the like with a capital, and is looked up in lower case.
_OFFICIAL = {**_contractions(_WITH_APOSTROPHE.split()), "somebody'd": "somebodyd"}
_TEXTVQA = {**_OFFICIAL, **_contractions(["i'd've", "i'm", "i've"])}
PROTOCOLS = ("official", "vl-adapter", "textvqa")


def vqa_accuracy(prediction: str, answers: Sequence[str], protocol: str = "official") -> float:
    """Returns the accuracy in [0, 1] of one output against the answers of people, usually ten.

    `official` normalises both sides only if the answers are not all equal; `vl-adapter` normalises
    the output always, and of the answers the punctuation if they are not all equal; `textvqa`
    normalises both sides always. Raises ValueError if there is no answer.
    """
    if not answers:
        raise ValueError("there is no answer to compare with")
    found, wanted = _SIDES[protocol](prediction, answers)
    right = [one == found for one in wanted]
    hits = sum(right)
    others = [min(1.0, (hits - one) / 3) for one in right]
    return sum(others) / len(others)


def normalised(text: str, contractions: dict[str, str] = _OFFICIAL) -> str:
    """Returns an answer as the tools compare it: without most punctuation and articles, in lower
    case, numbers up to ten as digits, contractions with their apostrophe.
    """
    words = [_DIGITS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str) -> str:
    """Returns the text with each mark taken away, or with a space for it if it is never beside one
    and the text has no number such as 1,000; full stops are kept before digits alone.
    """
    found, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside or number else " ")
    return _FULL_STOP.sub("", found, count=_STOPS)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _official(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    found, wanted = _flat(prediction), [_flat(one) for one in answers]
    if len(set(wanted)) == 1:
        return found, wanted
    return normalised(found), [normalised(one) for one in wanted]


def _vl_adapter(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    alike = len(set(answers)) == 1
    wanted = list(answers) if alike else [without_punctuation(one) for one in answers]
    return normalised(_flat(prediction)), wanted


def _textvqa(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return _evalai(prediction), [_evalai(one) for one in answers]


def _evalai(text: str) -> str:
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalised(_flat(words), _TEXTVQA)


_SIDES: dict[str, Callable[[str, Sequence[str]], tuple[str, list[str]]]] = {
    "official": _official,
    "vl-adapter": _vl_adapter,
    "textvqa": _textvqa,
}
