"""The experiments: one `weft compare` each, sized for two CPU cores. There are no measured numbers
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import prepare


@dataclass(frozen=True)
class Claim:
    """A claim about row `a` compared with row `b`. If `matches`, it says that `a` is not worse;
    otherwise that it is better.
    """

    a: str
    b: str
    says: str
    matches: bool = False


@dataclass(frozen=True)
class Experiment:
    """One comparison. `task`, `test` and `model` may contain {data}, the folder of the data sets,
    and {work}, the folder of `prepare`.

    `rates` are the learning rates to try by method. `about` describes data and model, in Markdown.
    """

    name: str
    page: str
    title: str
    model: str
    task: str
    methods: Sequence[str]
    budget: str
    seeds: int
    rates: Mapping[str, str]
    about: str
    claims: Sequence[Claim] = ()
    test: str | None = None
    head_lr: str | None = None
    like: str | None = None
    prepare: Callable[[Path, Path], None] | None = None
    more: Sequence[str] = ()
    workers: int = 2

    def command(self, data: str, work: str, out: str) -> list[str]:
        """Returns the arguments of `weft`."""

        def place(text: str) -> str:
            return text.format(data=data, work=work)

        words = ["compare", "--model", place(self.model), "--task", place(self.task)]
        words += ["--test", place(self.test)] if self.test else []
        words += [
            "--methods",
            ",".join(self.methods),
            "--seeds",
            str(self.seeds),
            "--budget",
            self.budget,
        ]
        for method, rates in self.rates.items():
            words += ["--lr", f"{method}={rates}"]
        words += ["--head-lr", self.head_lr] if self.head_lr else []
        words += ["--like", self.like] if self.like else []
        return [*words, *self.more, "--workers", str(self.workers), "--out", out]


ALL = (
    "full",
    "toplayers",
    "head",
    "bitfit",
    "lora",
    "dora",
    "dora:r=4",
    "lorafa",
    "adalora",
    "dylora",
    "vera",
    "dvora",
    "bottleneck",
    "prefix",
    "preembed",
    "prelayer",
)
PAIR = ("full", "lora", "dora", "vera", "dvora")
PAPERS = ("full", "head", "bitfit", "lora", "dora", "dora:r=4", "vera", "dvora", "bottleneck")
RATES = {
    "full": "1e-4,3e-4",
    "toplayers": "3e-4,1e-3",
    "head": "1e-2,3e-2",
    "bitfit": "1e-2,3e-2",
    "lora": "3e-3,1e-2",
    "dora": "3e-3,1e-2",
    "lorafa": "1e-2,3e-2",
    "adalora": "3e-2,1e-1",
    "dylora": "3e-3,1e-2",
    "vera": "3e-2,1e-1",
    "dvora": "3e-2,1e-1",
    "bottleneck": "3e-3,1e-2",
    "prefix": "3e-2,1e-1",
    "preembed": "3e-2,1e-1",
    "prelayer": "1e-2,3e-2",
}
IMAGES = {**RATES, "full": "3e-4,1e-3", "bitfit": "3e-3,1e-2"}
GENERATED = {"full": "1e-4,3e-4", "lora": "3e-3,1e-2", "dora": "3e-3,1e-2", "vera": "3e-2,1e-1"}

FEW = ("full", "head", "lora", "dora", "vera", "dvora")
LONGER = {
    "full": "3e-5,1e-4",
    "head": "3e-2,1e-1",
    "lora": "1e-3,3e-3",
    "dora": "1e-3,3e-3",
    "vera": "3e-2,1e-1",
    "dvora": "3e-2,1e-1",
}

VERA = Claim(
    "VeRA", "LoRA", "VeRA matches LoRA with a tenth of the parameters (VeRA paper)", matches=True
)
DORA = Claim("DoRA", "LoRA", "DoRA is better than LoRA (DoRA paper)")
HALF = Claim("DoRA r=4", "LoRA", "DoRA at half the rank is better than LoRA (DoRA paper)")
DVORA = Claim("DVoRA", "VeRA", "DVoRA is better than VeRA (DoRA paper)")
FULL = Claim("LoRA", "Full", "LoRA matches full fine-tuning (LoRA paper)", matches=True)
LORA_HEAD = Claim("LoRA", "Head", "LoRA is better than the head alone (VeRA paper, images)")
CORE = (FULL, VERA, DORA, HALF, DVORA)


def of(methods: Sequence[str], rates: Mapping[str, str]) -> dict[str, str]:
    """Returns the rates of these methods."""
    names = {method.partition(":")[0] for method in methods}
    return {name: tried for name, tried in rates.items() if name in names}


EXPERIMENTS = (
    Experiment(
        "sst2",
        "glue",
        "SST-2 with MiniLM",
        "minilm",
        "sst2:{data}/SST-2",
        ALL,
        "steps=50,batch=8,train=2000,validation=200,test=872",
        3,
        of(ALL, RATES),
        "Sentiment of film reviews, two classes. Batches are drawn from 2,000 of 67,349 training "
        "examples; 200 others are for choosing the learning rate; the scores are on GLUE's dev "
        "set.",
        CORE,
        head_lr="3e-3",
        like="vera-paper-glue",
    ),
    Experiment(
        "sst2-longer",
        "glue",
        "SST-2 with MiniLM, longer",
        "minilm",
        "sst2:{data}/SST-2",
        FEW,
        "steps=100,batch=16,train=2000,validation=200,test=872",
        3,
        of(FEW, LONGER),
        "The same task with four times as many examples seen, 100 steps of 16 instead of 50 of "
        "8, for fewer methods.",
        (FULL, VERA, DORA, DVORA),
        head_lr="3e-3",
        like="vera-paper-glue",
    ),
    Experiment(
        "mrpc",
        "glue",
        "MRPC with MiniLM",
        "minilm",
        "mrpc:{data}/MRPC",
        PAIR,
        "steps=40,batch=8,validation=200,test=400",
        3,
        of(PAIR, RATES),
        "Do two sentences mean the same? Two classes; two thirds of the pairs do. The copy has "
        "no dev set: 10 % of train are for choosing the learning rate, and the scores are on 400 "
        "pairs of MRPC's test set.",
        (FULL, VERA, DORA, DVORA),
        head_lr="3e-3",
        like="vera-paper-glue",
    ),
    Experiment(
        "cifar10",
        "images",
        "CIFAR-10, classes 5 to 9, with a small ViT",
        "{work}/vit",
        "image-folder:{work}/train",
        PAPERS,
        "steps=100,batch=20,train=100,validation=300,test=1000",
        3,
        of(PAPERS, IMAGES),
        "No pretrained vision model was available. `scripts/results/prepare.py` trains a Vision "
        "Transformer from scratch on CIFAR-10's classes 0 to 4 (aeroplane to deer); the methods "
        "then adapt it to classes 5 to 9 (dog to truck) with 20 images per class. The rates are "
        "chosen on 60 other images per class, and the scores are on 200 images per class from "
        "the test set. So this is few-shot adaptation of a small model; the VeRA paper uses "
        "large ones. The "
        "images are JPEG copies that differ slightly from the original data.",
        (*CORE, LORA_HEAD),
        test="{work}/test",
        head_lr="1e-2",
        prepare=prepare.cifar10,
        workers=1,
    ),
    Experiment(
        "e2e",
        "e2e",
        "E2E with stories15M",
        "{data}/../models/stories15m",
        "e2e:{data}/E2E:train=validation",
        ("full", "lora", "dora", "vera"),
        "steps=40,batch=4,validation=60,test=40",
        3,
        GENERATED,
        "Restaurant descriptions from slots. E2E's training file was not available, so the "
        "methods train on four fifths of the meanings of its validation file; the loss on the "
        "others is for choosing the learning rate. The scores are BLEU on 40 meanings of the "
        "test file.",
        (FULL, VERA, DORA),
        like="lora-paper-e2e",
    ),
    Experiment(
        "commonsense",
        "commonsense",
        "ARC-easy with stories15M",
        "{data}/../models/stories15m",
        "arc-e:{data}/COMMONSENSE",
        ("lora", "dora", "vera"),
        "steps=25,batch=4,validation=40,test=60",
        3,
        of(("lora", "dora", "vera"), GENERATED),
        "Science questions for children with three to five answers, in the instruction form of the "
        "DoRA paper; an answer is "
        "generated, and its first key word counts.",
        (VERA, DORA),
        like="dora-paper-commonsense",
    ),
)
