"""`weft judge`: MT-Bench, answers by a model and their grades by a judge model behind an
address.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .common import (
    BASE,
    add_adapter_option,
    add_device_options,
    add_json_option,
    add_model_option,
    print_notes,
    scores_text,
    settings,
    write_json,
)

HELP = "MT-Bench: answer its questions with a model, and have a judge model grade the answers"
# Options that have no effect without --model, and without --url.
ANSWERING = (
    "adapter",
    "other_base",
    "quantize",
    "set",
    "max_new_tokens",
    "seed",
    "chat_template",
    "batch",
    "dtype",
    "device",
)
JUDGING = (
    "judge",
    "key_env",
    "prompts",
    "references",
    "judge_set",
    "tries",
    "timeout",
    "again",
    "json",
)
KEY, ANSWERS, JUDGMENTS, ATTEMPTS = (
    "OPENAI_API_KEY",
    "answers.jsonl",
    "judgments.jsonl",
    "attempts.jsonl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--questions",
        required=True,
        metavar="FILE",
        type=Path,
        help="FastChat's question.jsonl (.gz too)",
    )
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("weft-judge"),
        help="the folder of answers, judgments and failed attempts; the same command resumes "
        "from it (default: weft-judge)",
    )
    add("--limit", type=int, metavar="N", help="the first N questions")
    _add_answer_arguments(parser)
    _add_judge_arguments(parser)
    add_json_option(parser, "write the scores there too")


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = f"answer with this base: {BASE} (default: the answers in --out)"
    add_model_option(parser, about, required=False)
    add_adapter_option(parser)
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 1024)")
    add(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="another setting of model.generate (default: MT-Bench's temperature of the category)",
    )
    add("--seed", type=int, metavar="N", help="of sampled answers (default: 0)")
    add("--chat-template", metavar="FILE", help="in place of the tokenizer's")
    add("--batch", type=int, metavar="N", help="questions per batch (default: 8)")
    add_device_options(parser, default=None)


def _add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--url",
        metavar="URL",
        help="an OpenAI-compatible endpoint, up to its /v1 (default: answer only)",
    )
    add("--judge", metavar="NAME", help="the judge model's name there; needed with --url")
    add(
        "--key-env",
        metavar="NAME",
        help=f"the environment variable that holds the key (default: {KEY}, if it is set)",
    )
    add(
        "--references",
        metavar="FILE",
        type=Path,
        help="a reference model's answers, in place of the questions' references",
    )
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="FastChat's judge_prompts.jsonl (default: Weft's own prompts)",
    )
    add(
        "--judge-set",
        action="append",
        metavar="KEY=VALUE",
        help="another field of the request; None leaves one out "
        "(default: temperature=0, max_tokens=2048)",
    )
    add(
        "--tries",
        type=int,
        metavar="N",
        help="requests per question before it is skipped (default: 6)",
    )
    add("--timeout", type=float, metavar="SECONDS", help="time limit of an answer (default: 120)")
    add(
        "--again",
        action="store_true",
        default=None,
        help="ask once more if the judge's text had no grade",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if all answers exist and are graded, 1 if some have no grade, 130 if interrupted;
    the answers and grades until then are kept.
    """
    from ..tasks.journal import Journal
    from ..tasks.mt_bench import read_answers, read_questions

    _check_arguments(args)
    questions = read_questions(args.questions, args.references)[: args.limit]
    settings = _settings(args.set, args.max_new_tokens) if args.model is not None else {}
    judge = _endpoint(args) if args.url is not None else None
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with Journal(args.out / ANSWERS) as kept:
            if args.model is not None:
                _answer(args, questions, kept, settings)
            answers = read_answers(kept.rows, str(kept.path))
        if judge is None:
            print(
                f"{len(answers)} questions are answered in {args.out / ANSWERS}. Have them judged "
                "with --url and --judge."
            )
            return 0
        return _judge(args, questions, answers, judge)
    except KeyboardInterrupt:
        _report(
            f"\nInterrupted. Answers and judgments so far are in {args.out}; the same command "
            "continues."
        )
        return 130


def _check_arguments(args: argparse.Namespace) -> None:
    from ..errors import ConfigError

    if args.model is None and args.url is None:
        raise ConfigError(
            "nothing to do: give --model M to answer, --url URL --judge NAME to judge, or both."
        )
    for needed, options in (("model", ANSWERING), ("url", JUDGING)):
        idle = [name for name in options if getattr(args, name) not in (None, False)]
        if getattr(args, needed) is None and idle:
            raise ConfigError(f"--{idle[0].replace('_', '-')} has no effect without --{needed}.")
    if args.url is not None and args.judge is None:
        raise ConfigError("--url needs --judge NAME, the judge model's name there.")
    for name in ("limit", "max_new_tokens", "batch", "tries", "timeout"):
        if getattr(args, name) is not None and not getattr(args, name) >= (
            1e-3 if name == "timeout" else 1
        ):
            raise ConfigError(f"--{name.replace('_', '-')} is a number, 1 or more.")
    for path in (args.questions, args.references, args.prompts):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path}: there is no such file.")
    if args.model is None and not (args.out / ANSWERS).is_file():
        raise ConfigError(
            f"{args.out / ANSWERS} does not exist. Give --model M to answer the questions, or put "
            "answers in FastChat's format there."
        )


def _settings(texts: list[str] | None, max_new_tokens: int | None) -> dict[str, Any]:
    from ..errors import ConfigError
    from ..inference.generate import check_settings

    option = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    given = settings(texts or (), option)
    check_settings(given)
    if {"do_sample", "temperature"} <= set(given) and bool(given["do_sample"]) != bool(
        given["temperature"]
    ):
        raise ConfigError(
            "--set do_sample and --set temperature contradict each other; a temperature above 0 "
            "samples."
        )
    return given


def _endpoint(args: argparse.Namespace) -> Any:
    from ..errors import ConfigError
    from ..tasks.endpoint import Endpoint, Patience
    from ..tasks.mt_bench import SETTINGS

    fields = {**SETTINGS, **settings(args.judge_set or ())}
    own = [name for name in ("model", "messages", "stream", "n") if name in fields]
    if own:
        raise ConfigError(f"--judge-set {own[0]}: this field is set by weft judge itself.")
    name = args.key_env or KEY
    if args.key_env is not None and name not in os.environ:
        raise ConfigError(f"--key-env {name}: there is no such environment variable.")
    usual = Patience()
    return Endpoint(
        args.url,
        args.judge,
        os.environ.get(name) or None,
        name,
        fields,
        Patience(args.tries or usual.tries, args.timeout or usual.timeout),
    )


def _answer(
    args: argparse.Namespace, questions: list[Any], kept: Any, settings: dict[str, Any]
) -> None:
    from ..inference.opened import open_model
    from ..inference.two_turns import answer_all, check_kept, maker, read_template

    template = None if args.chat_template is None else read_template(args.chat_template)
    made_by = maker(args.model, args.adapter, settings, args.seed or 0, template)
    check_kept(kept, made_by, questions)
    if {question.id for question in questions} <= {row["question_id"] for row in kept.rows}:
        return
    opened = open_model(
        args.model,
        args.adapter,
        args.dtype or "auto",
        args.device or "auto",
        template,
        args.other_base,
        args.quantize,
    )
    print_notes(opened.notes)
    answer_all(opened, questions, kept, made_by, args.batch or 8, _report)


def _judge(
    args: argparse.Namespace, questions: list[Any], answers: dict[Any, Any], judge: Any
) -> int:
    from ..tasks.journal import Journal
    from ..tasks.judge_prompts import OURS, read_prompts
    from ..tasks.judging import judge_all, summary
    from ..tasks.mt_bench import asks

    prompts = OURS if args.prompts is None else read_prompts(args.prompts)
    wanted = asks(questions, answers, judge, prompts, str(args.out / ANSWERS))
    with Journal(args.out / JUDGMENTS) as judgments, Journal(args.out / ATTEMPTS) as attempts:
        outcome = judge_all(
            wanted, judge, judgments, attempts, again=bool(args.again), on_progress=_report
        )
    report, counts = summary(wanted, outcome)
    print(
        f"mt-bench, judged by {args.judge}: {counts['graded']} of {counts['answers']} answers have "
        "a grade"
    )
    print(scores_text(report))
    write_json(
        args.json,
        {
            "schema": 1,
            "task": "mt-bench",
            "judge": args.judge,
            "prompts": "weft" if args.prompts is None else "file",
            "scores": report.scores,
            "reasons": report.reasons,
            "notes": report.notes,
            "counts": counts,
        },
    )
    if counts["graded"] == counts["answers"]:
        return 0
    cure = (
        " --again asks once more if the judge's text had no grade." if counts["unparsable"] else ""
    )
    _report(
        f"Not every answer has a grade. The judgments so far are in {args.out}; the same command "
        f"continues.{cure}"
    )
    return 1


def _report(text: str) -> None:
    from ..untrusted.printable import printable

    print(printable(text), file=sys.stderr, flush=True)
