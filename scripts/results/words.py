"""The hand-written text of the pages. There are no measured numbers here."""

TITLES = {
    "glue": "Sentences: GLUE",
    "images": "Images",
    "e2e": "Text from slots: E2E",
    "commonsense": "Commonsense questions",
}

PAGES = {
    "glue": """
GLUE's tasks with all-MiniLM-L6-v2, a real pretrained encoder of six layers and 22.7 M parameters, installed by pip
([`minilm`](../tasks.md#models-that-come-by-pip)). The papers use RoBERTa base (125 M) and large (355 M), the whole training
data, and the best epoch on the data that they report. Here the learning rate is chosen on other examples, and the last
step is scored.

MiniLM was trained so that the mean over a sentence's tokens represents its meaning (`1_Pooling` in the package). The
classification model of `transformers` reads the pooled first token instead, which that training did not use. So the head
alone has little information, and a method must change the layers below to get far above chance in a few dozen steps.
""",
    "images": """
A few images per class, as in the VeRA paper, with a model about three hundred times smaller than its ViT-B.
""",
    "e2e": """
A language model with 15 M parameters, pretrained on children's stories, learns to describe restaurants. The papers use GPT-2
medium (355 M) and large (774 M), ten times as much data, and 26,000 steps.
""",
    "commonsense": """
A language model with 15 M parameters, pretrained on children's stories: the largest one that fits the time on two cores. The
DoRA paper uses models of 7 B and more. Scores near chance are expected here, and say nothing about the methods.
""",
}

INDEX = """
Methods compared by [`weft compare`](../command-line.md#weft-compare) on real pretrained models and real data, at equal
steps. Everything is sized for two CPU cores, so models and runs are far smaller than the papers'. A result here need not
hold at their scale, nor theirs here.
"""

READING = """
Scores are means over seeds, ± half of the 95 % t-interval. The learning rate of each
method was chosen with two other seeds on validation examples. A row is called worse than the best only if a paired t-test
over the seeds, or one over the test examples, is significant at {alpha:.0%}, each corrected for the number of rows (Holm).
Rows without a significant difference are not ordered. Few seeds only show large gaps; the examples show smaller ones, but
for these runs only. Each claim of the papers is tested separately, by the paired difference over the seeds and its 95 %
interval, without a correction for their number. “Matches” means: not more than {margin:.0f} points below.
"""

AGAIN = """
The records are in `docs/results/records`; `make results` generates these pages from them, in seconds. To regenerate a
record:

```console
$ make models
$ .venv/bin/python -m scripts.results run sst2 --data DATA
```

DATA is a folder with the data sets in their authors' format (SST-2 with train.tsv and dev.tsv, and so on). More claims are
tested with ten seeds on the small embedded model in [Testing the papers' claims](../claims.md).
"""


def flowing(text: str) -> str:
    """Joins the lines of each paragraph; code blocks are kept."""
    parts = text.strip().split("\n\n")
    return "\n\n".join(part if part.startswith("```") else " ".join(part.split()) for part in parts)
