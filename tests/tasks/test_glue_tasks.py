"""GLUE's folders: formats, the two protocols, and a regression that is trained and scored."""

import pytest
import torch

import weft
from weft.compare.bench import Bench
from weft.compare.plan import RunSpec
from weft.compare.tasks.labelled import LabelledTask
from weft.tasks import GLUE, find_task
from weft.tasks.glue import SETS
from weft.tasks.metrics import of_logits
from weft.tasks.models import find_model, prepare

ROWS = 40


def folder(place, name):
    """Train and dev of a set as GLUE publishes them."""
    known = SETS[name]
    names = known.texts[0]
    for split, size in (("train", ROWS), (known.dev[0], 10)):
        lines = (
            [] if name == "cola" else ["\t".join([*names, "score" if name == "stsb" else "label"])]
        )
        for i in range(size):
            label = (
                f"{i % 6 * 0.9:.1f}" if name == "stsb" else known.classes[i % len(known.classes)]
            )
            texts = [f'{split} "{column} {i}' for column in names]
            lines.append(
                "\t".join(["src", str(i % 2), "*", *texts] if name == "cola" else [*texts, label])
            )
        (place / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return place


@pytest.mark.parametrize("name", GLUE)
def test_the_honest_protocol_chooses_on_a_part_of_train_and_reports_dev(tmp_path, name):
    task = find_task(f"{name}:{folder(tmp_path, name)}").load()
    train, held, test = (task.splits[split] for split in ("train", "validation", "test"))
    assert len(train) + len(held) == ROWS and len(held) >= 3 and len(test) == 10
    assert not set(train.items) & set(held.items)
    assert all(item[0].startswith("train") for item in held.items)
    assert all(item[0].startswith(SETS[name].dev[0]) for item in test.items)
    assert task.metric == {"cola": "Matthews", "stsb": "Pearson"}.get(name, "accuracy")
    assert task.classes == SETS[name].classes and "validation is 10% of train" in task.notes[0]


@pytest.mark.parametrize("name", GLUE)
def test_the_papers_protocol_is_there_and_says_that_it_is_optimistic(tmp_path, name):
    task = find_task(f"{name}-paper:{folder(tmp_path, name)}").load()
    assert task.splits["validation"] == task.splits["test"] and len(task.splits["train"]) == ROWS
    assert "optimistic" in task.notes[0]


def test_labels_may_be_numbers_and_mrpc_has_its_authors_columns(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    (tmp_path / "train.tsv").write_text(header + "1\t1\t2\ta\tb\n0\t1\t2\tc\td\n" * 12)
    (tmp_path / "test.tsv").write_text(header + "1\t1\t2\te\tf\n")
    task = find_task(f"mrpc:{tmp_path}").load()
    assert task.splits["test"].items == [("e", "f")] and task.splits["test"].labels == [1]


def test_one_file_is_split_in_three(tmp_path):
    folder(tmp_path, "qnli")
    (tmp_path / "train.tsv").unlink()
    task = find_task(f"qnli:{tmp_path}").load()
    assert (
        sum(len(split) for split in task.splits.values()) == 10 and "60, 20 and 20" in task.notes[0]
    )
    with pytest.raises(weft.WeftError, match="only one of them is there"):
        find_task(f"qnli-paper:{tmp_path}").load()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "sizes"), [("RTE", (2490, 277)), ("SST-2", (67349, 872)), ("MRPC", (4076, 1725))]
)
def test_the_real_files_are_read_whole(shared, name, sizes):
    task = find_task(
        f"{name.lower().replace('-', '')}-paper:{shared / 'data' / 'datasets' / name}"
    ).load()
    assert (len(task.splits["train"]), len(task.splits["test"])) == sizes


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "sst2",
            "sentence\tlabel\na\t2\n",
            r"row 1: the label '2' is none of \['negative', 'positive'\]",
        ),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tx\n", "row 1: the score 'x' is no number"),
        ("rte", "sentence1\tlabel\na\t1\n", r"row 1: \['sentence2'\] must be there"),
    ],
)
def test_a_row_at_fault_is_named(tmp_path, name, text, said):
    (tmp_path / "train.tsv").write_text(text)
    (tmp_path / "dev.tsv").write_text(text)
    with pytest.raises(weft.WeftError, match=said):
        find_task(f"{name}:{tmp_path}").load()


def test_glue_takes_no_other_test_data_and_needs_a_folder(tmp_path):
    with pytest.raises(weft.ConfigError, match="its own test data"):
        find_task("sst2", test=str(tmp_path))
    with pytest.raises(weft.ConfigError, match="must be a folder"):
        find_task(f"sst2:{tmp_path / 'x.tsv'}")
    with pytest.raises(weft.WeftError, match="neither train nor dev"):
        find_task(f"sst2:{tmp_path}").load()


def bert(place, words):
    """A BERT of one thin layer and a tokenizer of these words, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(place)
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(names),
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=16,
            initializer_range=0.3,
        )
    ).save_pretrained(place)
    return str(place)


def test_a_regression_is_trained_by_squared_error_and_scored_by_its_metric(tmp_path):
    words = {"fine": 4.5, "good": 3.5, "odd": 2.0, "dull": 0.5}
    for split, size in (("train", 80), ("dev", 24)):
        drawn = [list(words.items())[i % 4] for i in range(size)]
        rows = [
            f"the film\twas {word} {'so' * (i % 3 == 0)}\t{score}"
            for i, (word, score) in enumerate(drawn)
        ]
        (tmp_path / f"{split}.tsv").write_text(
            "\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n"
        )
    task = find_task(f"stsb:{tmp_path}").load()
    model = find_model(bert(tmp_path / "bert", ["the", "film", "was", "so", *words]))
    prepared = prepare(task, model, {})
    bench = Bench(LabelledTask(prepared), torch.device("cpu"))
    config = weft.methods.to_json(weft.LoRA(r=4, modules_to_save=bench.head))
    spec = RunSpec(
        label="lora",
        config=config,
        lr=1e-2,
        head_lr=1e-2,
        seed=0,
        steps=120,
        batch=20,
        purpose="final",
    )
    result = bench.run(spec)
    assert result["status"] == "finished", result
    assert result["test"]["score"] > 0.6  # chance is 0, with a spread of 0.2
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    assert bench.describe()["metric"] == "Pearson" and bench.describe()["classes"] == []


def test_metrics_of_logits():
    labels = torch.tensor([0, 1, 1])
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert of_logits("accuracy", logits, labels) == pytest.approx(2 / 3)
    assert of_logits("Matthews", logits, labels) == pytest.approx(0.5)
    assert of_logits(
        "Pearson", torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.0, 4.0, 6.0])
    ) == pytest.approx(1.0)
    assert of_logits("Pearson", torch.ones(3, 1), torch.tensor([2.0, 4.0, 6.0])) == 0.0
