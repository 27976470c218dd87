"""What the pages say by hand: nothing here is a measured number."""

TITLES = {
    "glue": "Sentences: GLUE",
    "images": "Images",
    "e2e": "Text from slots: E2E",
    "commonsense": "Commonsense questions",
}

PAGES = {
    "glue": """
GLUE's tasks with all-MiniLM-L6-v2, a real pretrained encoder of six layers and 22.7 M numbers that comes by pip
([`minilm`](../tasks.md#models-that-come-by-pip)). The papers use RoBERTa base (125 M) and large (355 M), the whole training
data, and the best epoch on the very data that they report. Here the learning rate is chosen on other examples and the last
step is scored.

MiniLM was trained so that the mean over a sentence's tokens says what it means (`1_Pooling` in the package). The
classification model of `transformers` reads the pooled first token instead, which that training did not use. So the head
alone has little to go by, and a method must change the layers below to get far from chance in a few dozen steps.
""",
    "images": """
A few images of each class, as in the VeRA paper, with a model some three hundred times smaller than its ViT-B.
""",
    "e2e": """
A language model of 15 M numbers that has read children's stories, trained to describe restaurants. The papers use GPT-2
medium (355 M) and large (774 M), ten times as much data, and 26,000 steps.
""",
    "commonsense": """
A language model of 15 M numbers that has read children's stories: the largest one that fits the time on two cores. The DoRA
paper uses models of 7 B and more. A score near chance is to be expected here, and says nothing about the methods.
""",
}

INDEX = """
Methods compared by [`weft compare`](../command-line.md#weft-compare) on real pretrained models and real data, at equal
steps. Everything was sized for two CPU cores, so models and runs are far smaller than the papers': what is seen here need
not hold there, and the other way round.
"""

READING = """
Scores are means over seeds; behind ± stands half of the 95 % t-interval. The learning rate of each
method was chosen by two other seeds on validation examples. A row is called worse than the best only where a paired t-test
over the seeds, or one over the test examples, says so at {alpha:.0%}, each corrected for the number of rows (Holm); rows
between which they see no difference are in no order. Few seeds see large gaps only; the examples see smaller ones, but for
these very runs. Each claim of the papers is tested by itself, by the paired difference over the seeds and its 95 % interval,
without a correction for their number. “Matches” means: not more than {margin:.0f} points below.
"""

AGAIN = """
The records lie in `docs/results/records`; `make results` writes these pages from them, in seconds. To make a record anew:

```console
$ make models
$ .venv/bin/python -m scripts.results run sst2 --data DATA
```

DATA is a folder with the data sets as their authors give them (SST-2 with train.tsv and dev.tsv, and so on). More claims,
each with ten seeds on the small embedded model, are tried in [Claims, tried](../claims.md).
"""


def flowing(text: str) -> str:
    """Paragraphs as one line each; blocks of code stay."""
    parts = text.strip().split("\n\n")
    return "\n\n".join(part if part.startswith("```") else " ".join(part.split()) for part in parts)
