"""Tasks: what a Trainer gets of a user's rows, what the scores mean, and the model that goes with them."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from nblora import tasks
from nblora.tasks import IGNORED, BaseModel, ImageRows, TaskData, TaskError, load_base_model, prepare

PAD, END, BEGIN = 0, 1, 2
MARKED = (
    "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }};{% endgeneration %}{% else %}{{ message.content }};{% endif %}{% endfor %}"
)
UNMARKED = "{% for message in messages %}[{{ message.role }}]{{ message.content }};{% endfor %}"


@pytest.fixture(autouse=True)
def _no_bars(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# --- models and data ---


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A token for each byte; `closed` adds one at both ends of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    closed = options.pop("closed", False)
    names = ["<pad>", "<end>", "<begin>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A <end>",
            pair="<begin> $A <end> $B:1 <end>:1",
            special_tokens=[("<begin>", BEGIN), ("<end>", END)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", **{"pad_token": "<pad>", **options}
    )


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def llama(folder: Path, **tokenizer: Any) -> str:
    config = LlamaConfig(
        **SIZES, vocab_size=260, max_position_embeddings=512, eos_token_id=END, bos_token_id=None
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(**tokenizer).save_pretrained(folder)
    return str(folder)


def bert(folder: Path, kind: Any = BertForSequenceClassification, **config: Any) -> str:
    kind(BertConfig(**SIZES, vocab_size=260, max_position_embeddings=128, **config)).save_pretrained(folder)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    byte_tokenizer(closed=True, sep_token="<end>", model_input_names=inputs).save_pretrained(folder)
    return str(folder)


def named(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def vit(folder: Path, kind: Any = ViTForImageClassification, channels: int = 1, **config: Any) -> str:
    kind(ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=channels, **config)).save_pretrained(
        folder
    )
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of models that are only read, each made once."""
    folder = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], str]] = {
        "llama": llama,
        "marked chat": lambda path: llama(path, chat_template=MARKED),
        "chat": lambda path: llama(path, chat_template=UNMARKED),
        "closed llama": lambda path: llama(path, closed=True),
        "bert": lambda path: bert(path, **named("bad", "good")),
        "bare bert": lambda path: bert(path, BertModel),
        "tagger": lambda path: bert(path, BertForTokenClassification, **named("O", "NAME", "PLACE")),
        "vit": lambda path: vit(path, num_labels=10),
        "cats": lambda path: vit(path, **named("cat", "dog")),
        "bare vit": lambda path: vit(path, ViTModel),
        "colours": lambda path: vit(path, channels=3, num_labels=2),
        "t5": t5,
    }

    def model(name: str) -> str:
        path = folder / name.replace(" ", "-")
        return str(path) if path.is_dir() else makers[name](path)

    return model


def t5(folder: Path) -> str:
    config = T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer(closed=True).save_pretrained(folder)
    return str(folder)


def table(path: Path, **columns: list[Any]) -> str:
    """A JSON Lines file."""
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def splits(folder: Path, features: Features | None = None, **rows: dict[str, list[Any]]) -> str:
    """A data set on disk."""
    DatasetDict({name: Dataset.from_dict(some, features) for name, some in rows.items()}).save_to_disk(
        str(folder)
    )
    return str(folder)


def three(folder: Path, rows: dict[str, list[Any]], features: Features | None = None) -> str:
    """A data set whose splits all have the same rows."""
    return splits(folder, features, train=rows, validation=rows, test=rows)


def pictures(folder: Path, count: int = 12, labels: tuple[str, ...] = ("cat", "dog")) -> str:
    generator = np.random.default_rng(0)
    for index in range(count):
        file = folder / labels[index % len(labels)] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(file)
    return str(folder)


def stream_of(rows: Any) -> list[int]:
    return [token for row in rows for token in row["input_ids"].tolist()]


def text_of(data: TaskData, tokens: Any) -> str:
    return str(data.processor.decode([token for token in tokens if token != IGNORED]))


def trainer_for(data: TaskData, base: BaseModel, folder: Path, **arguments: Any) -> Trainer:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **arguments,
    }
    trainer = Trainer(
        model=base.model,
        args=TrainingArguments(str(folder), **options),
        train_dataset=data.train,
        data_collator=data.collator,
        compute_metrics=data.compute_metrics,
        preprocess_logits_for_metrics=data.preprocess_logits,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measured(data: TaskData, model: Any, rows: Any, folder: Path) -> dict[str, float]:
    found = trainer_for(data, BaseModel(model, None, None), folder).evaluate(rows)
    return {name.removeprefix("eval_"): value for name, value in found.items()}


# --- every task, from a file to a trained model ---


def example(task: str, folder: Path, models: Callable[[str], str]) -> tuple[str, str]:
    """A model and data for each task."""
    words = [f"{'good' if index % 2 else 'bad'} number {index}" for index in range(40)]
    if task == "causal-lm":
        return models("llama"), table(folder / "text.jsonl", text=words)
    if task == "seq-cls":
        return models("bert"), table(folder / "rows.jsonl", review=words, label=["bad", "good"] * 20)
    if task == "token-cls":
        tags = [["O", "NAME", "O"]] * 40
        return models("tagger"), table(folder / "rows.jsonl", tokens=[w.split() for w in words], tags=tags)
    if task == "seq2seq":
        return models("t5"), table(folder / "rows.jsonl", source=words, target=words[::-1])
    return models("vit"), pictures(folder / "images", 40, tuple("0123456789"))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_trains_and_is_scored(
    tmp_path: Path, models: Callable[[str], str], task: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a word on the way, and the same on every run."""
    model, source = example(task, tmp_path, models)
    capfd.readouterr()
    data = prepare(task, model, source, source, max_length=None if task == "image-cls" else 64)
    again = prepare(task, model, source, source, max_length=None if task == "image-cls" else 64)
    base = load_base_model(data, model)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert data.keep_validation is not None
    assert data.keep_test is not None
    for name in ("train", "validation", "test", "keep_validation", "keep_test"):
        rows, other = getattr(data, name), getattr(again, name)
        assert len(rows) == len(other) > 0
        assert all(torch.equal(rows[0][key], other[0][key]) for key in rows[0])
    restored = pickle.loads(pickle.dumps(data))
    assert torch.equal(restored.train[0]["labels"], data.train[0]["labels"])
    assert not data.new_head
    assert base.original_head is None
    assert base.untrained == ()
    trainer = trainer_for(data, base, tmp_path / "out")
    trainer.train()
    scores = {key.removeprefix("eval_"): value for key, value in trainer.evaluate(data.test).items()}
    language = task in tasks.LANGUAGE_TASKS
    assert data.metric == ("nats" if language else "accuracy")
    assert scores["score"] == (-scores["nats"] if language else scores["accuracy"])
    assert scores["nats"] > 0
    assert 0 <= scores["accuracy"] <= 1
    assert ("perplexity" in scores) == language
    assert ("f1" in scores) == (task == "token-cls")
    assert base.head == {"seq-cls": "classifier", "token-cls": "classifier", "image-cls": "classifier"}.get(
        task
    )


# --- scores ---


def reference(data: TaskData, model: Any, rows: Any) -> tuple[float, float]:
    """Mean nats over all predictions, and the mean of the rows' means, one row at a time."""
    totals, counts = [], []
    for index in range(len(rows)):
        batch = data.collator([rows[index]])
        with torch.no_grad():
            logits = model(**batch).logits.double()
        labels = batch["labels"]
        if data.task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        used = labels != IGNORED
        totals.append(float(nn.functional.cross_entropy(logits[used], labels[used], reduction="sum")))
        counts.append(int(used.sum()))
    return sum(totals) / sum(counts), float(np.mean(np.divide(totals, counts)))


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq", "token-cls"])
def test_nats_are_an_exact_mean_over_tokens(tmp_path: Path, models: Callable[[str], str], task: Any) -> None:
    """Rows of very different length, in batches of three, the last one smaller."""
    lengths = [1, 2, 40, 3, 5, 60, 2]
    if task == "token-cls":
        rows: dict[str, list[Any]] = {
            "tokens": [["ab"] * length for length in lengths],
            "tags": [["NAME"] * length for length in lengths],
        }
    else:
        roles = ("source", "target") if task == "seq2seq" else ("prompt", "completion")
        rows = dict(zip(roles, ([f"{n}" for n in lengths], ["b a" * n for n in lengths])))
    model = models({"causal-lm": "llama", "seq2seq": "t5", "token-cls": "tagger"}[task])
    data = prepare(task, model, three(tmp_path / "rows", rows))
    base = load_base_model(data, model)
    base.model.eval()
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(8)  # far from the uniform distribution, so that rows differ
    mean, mean_of_means = reference(data, base.model, data.test)
    scores = measured(data, base.model, data.test, tmp_path / "out")
    assert scores["nats"] == pytest.approx(mean, rel=1e-5)
    assert abs(mean - mean_of_means) > 1e-3 * mean, "the rows must tell the two means apart"


def test_scores_of_known_logits() -> None:
    data = task_data("causal-lm")
    logits = torch.full((2, 4, 5), -1e4)
    labels = torch.tensor([[4, 1, 2, IGNORED], [IGNORED, 3, IGNORED, IGNORED]])
    logits[0, 0, 1] = 0  # right
    logits[0, 1, [2, 3]] = torch.tensor([math.log(0.25), math.log(0.75)])  # wrong
    logits[1, 0, 3] = 0  # right
    rows = data.preprocess_logits((logits, torch.zeros(2)), labels)
    assert rows.tolist() == [pytest.approx([-math.log(0.25), 2, 1]), pytest.approx([0, 1, 1])]
    scores = data.compute_metrics(EvalPrediction(rows.numpy(), labels.numpy()))
    nats = -math.log(0.25) / 3
    assert scores == pytest.approx(
        {"score": -nats, "nats": nats, "accuracy": 2 / 3, "perplexity": math.exp(nats)}
    )


def test_macro_f1() -> None:
    data = task_data("token-cls")
    labels = torch.tensor([[0, 0, 0, 1, 1, IGNORED], [2, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]])
    predicted = torch.tensor([[0, 0, 1, 1, 0, 3], [3, 0, 0, 0, 0, 0]])
    rows = data.preprocess_logits(10 * nn.functional.one_hot(predicted, 4).float(), labels)
    scores = data.compute_metrics(EvalPrediction(rows.numpy(), labels.numpy()))
    assert scores["accuracy"] == pytest.approx(3 / 6)
    # class 0: 2 of 3 found, 2 of 3 right; 1: 1 of 2 found, 1 of 2 right; 2: missed; 3: made up
    assert scores["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)


def task_data(task: Any) -> TaskData:
    """Only what scores need."""
    missing: Any = None
    metric: Any = "nats" if task in tasks.LANGUAGE_TASKS else "accuracy"
    return TaskData(
        task=task, train=missing, validation=missing, test=missing, keep_validation=None, keep_test=None,
        labels=None, keep_labels=None, new_head=False, processor=None, collator=missing, metric=metric,
    )  # fmt: skip


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_nan(task: Any, bad: float) -> None:
    data = task_data(task)
    logits = torch.zeros(2, 4, 5)
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, IGNORED, IGNORED]])
    if task in ("seq-cls", "image-cls"):
        logits, labels = logits[:, 0], labels[:, 0]
    logits[0] = bad
    scores = data.compute_metrics(
        EvalPrediction(data.preprocess_logits(logits, labels).numpy(), labels.numpy())
    )
    assert all(math.isnan(value) for value in scores.values())


def test_a_hopeless_model_has_infinite_perplexity_and_no_predictions_have_no_score() -> None:
    data = task_data("seq2seq")
    scores = data.compute_metrics(EvalPrediction(np.array([[1000.0, 1, 0]]), np.array([[1]])))
    assert scores == {"score": -1000, "nats": 1000, "accuracy": 0, "perplexity": math.inf}
    scores = data.compute_metrics(EvalPrediction(np.array([[0.0, 0, 0]]), np.array([[IGNORED]])))
    assert all(math.isnan(value) for value in scores.values())


def test_logits_in_parts_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = task_data("causal-lm")
    logits, labels = torch.randn(3, 9, 7), torch.randint(0, 7, (3, 9))
    whole = data.preprocess_logits(logits, labels)
    monkeypatch.setattr("nblora.tasks.preparation.LOGITS_AT_ONCE", 14)
    assert torch.allclose(data.preprocess_logits(logits, labels), whole)
    assert data.preprocess_logits(logits.bfloat16(), labels).dtype == torch.float32


# --- language ---


def test_plain_text_is_packed(tmp_path: Path, models: Callable[[str], str]) -> None:
    """Documents follow one another, each with an end token; nothing but the last block's rest is lost."""
    texts = ["first", "", "the second, ünï", "x" * 50]
    data = prepare("causal-lm", models("llama"), three(tmp_path / "rows", {"text": texts}), max_length=16)
    encoded = data.processor([text for text in texts if text])["input_ids"]
    stream = [token for document in encoded for token in (*document, END)]
    blocks = [row["input_ids"].tolist() for row in data.train]
    assert all(len(block) == 16 for block in blocks)
    assert stream_of(data.train) == stream[: 16 * (len(stream) // 16)]
    assert stream_of(data.test) == stream, "scores are over all of it"
    assert len(data.test) == len(blocks) + 1
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in data.train)


def test_packing_with_a_tokenizer_that_closes_texts(tmp_path: Path, models: Callable[[str], str]) -> None:
    rows = {"text": ["one", "two"]}
    data = prepare("causal-lm", models("closed llama"), three(tmp_path / "rows", rows), max_length=5)
    one, two = data.processor(["one", "two"], add_special_tokens=False)["input_ids"]
    assert stream_of(data.test) == [BEGIN, *one, END, BEGIN, *two, END]


def test_passages_of_a_text_file_are_joined(tmp_path: Path, models: Callable[[str], str]) -> None:
    """Only where a passage went to another split, or a document ends, there is an end token."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{number}\n" for number in range(3000)))
    source = str(tmp_path)
    data = prepare("causal-lm", models("llama"), source, max_length=64)
    passages = tasks.columns.Source("causal-lm", source, None).splits["train"]
    chosen = tasks.preparation.target_parts({"train": len(passages)}, source, seed=0)["train"].indices
    expected, before = "", None
    for row in passages.select(chosen):
        goes_on = before == (row["document"], row["passage"] - 1)
        expected += ("" if goes_on or before is None else "<end>") + row["text"]
        before = (row["document"], row["passage"])
    assert (expected + "<end>").startswith(text_of(data, stream_of(data.train)))
    assert 3 < expected.count("<end>") < len(chosen) / 2, "most passages follow each other"


@pytest.mark.parametrize("role", ["text", "passage"])
def test_columns_called_like_those_of_text_files(
    tmp_path: Path, models: Callable[[str], str], role: str
) -> None:
    rows = {"text": ["ab"], "document": ["d"], "passage": ["cd"]}
    source = three(tmp_path / "rows", rows)
    data = prepare("causal-lm", models("llama"), source, columns={"text": role}, max_length=3)
    assert text_of(data, stream_of(data.train)) == rows[role][0] + "<end>"


def test_only_the_completion_is_predicted(tmp_path: Path, models: Callable[[str], str]) -> None:
    rows = {
        "question": ["What is 2 + 2?", "Count:\n", "", "Go"],
        "answer": ["4", "1 2 3", "yes", " on"],
        "id": [1, 2, 3, 4],
    }
    data = prepare("causal-lm", models("llama"), three(tmp_path / "rows", rows))
    assert [text_of(data, row["input_ids"]) for row in data.train] == [
        "What is 2 + 2?\n4<end>", "Count:\n1 2 3<end>", "yes<end>", "Go on<end>",
    ]  # fmt: skip
    assert [text_of(data, row["labels"]) for row in data.train] == [
        "4<end>",
        "1 2 3<end>",
        "yes<end>",
        " on<end>",
    ]
    row = data.train[0]
    assert torch.equal(row["labels"][-2:], row["input_ids"][-2:])


def test_prompts_with_a_tokenizer_that_closes_texts(tmp_path: Path, models: Callable[[str], str]) -> None:
    rows = {"instruction": ["Add", "Add"], "input": ["2 2", None], "output": ["4", "0"]}
    data = prepare("causal-lm", models("closed llama"), three(tmp_path / "rows", rows))
    assert [text_of(data, row["input_ids"]) for row in data.train] == [
        "<begin>Add\n\n2 2\n4<end>", "<begin>Add\n0<end>",
    ]  # fmt: skip
    assert text_of(data, data.train[0]["labels"]) == "4<end>"


def test_rows_are_cut_and_those_without_predictions_left_out(
    tmp_path: Path, models: Callable[[str], str]
) -> None:
    rows = {"prompt": ["ab ", "long " * 10], "completion": ["completion", "x"]}
    data = prepare("causal-lm", models("llama"), three(tmp_path / "rows", rows), max_length=8)
    assert [text_of(data, row["input_ids"]) for row in data.train] == ["ab compl"]
    with pytest.raises(
        TaskError, match="must have a token to predict within max_length=3, got none in the train"
    ):
        prepare("causal-lm", models("llama"), str(tmp_path / "rows"), max_length=3)


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    ("model", "predicted"),
    [("marked chat", "hello;no;"), ("chat", "[user]hi;[assistant]hello;[user]more;[assistant]no;")],
)
def test_chats(tmp_path: Path, models: Callable[[str], str], model: str, predicted: str) -> None:
    """Assistant turns are predicted where the template marks them, else everything."""
    source = three(tmp_path / "rows", {"messages": [CHAT, CHAT[:2]]})
    data = prepare("causal-lm", models(model), source)
    assert text_of(data, data.train[0]["input_ids"]) == "[user]hi;[assistant]hello;[user]more;[assistant]no;"
    assert text_of(data, data.train[0]["labels"]) == predicted


def test_chats_in_other_words(tmp_path: Path, models: Callable[[str], str]) -> None:
    said = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]] * 4
    data = prepare("causal-lm", models("chat"), table(tmp_path / "rows.jsonl", conversations=said))
    assert text_of(data, data.train[0]["input_ids"]) == "[user]hi;[assistant]hello;"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], r"a chat must be a list of messages, got \[\] in row 2 of split 'train' of"),
        (
            [{"content": "x"}],
            r"every message must have a 'role', got {'content': 'x'.* in row 2 of split 'train'",
        ),
    ],
)
def test_broken_chats(tmp_path: Path, models: Callable[[str], str], chat: Any, message: str) -> None:
    good = table(tmp_path / "test.jsonl", messages=[CHAT[:2]] * 3)
    table(tmp_path / "train.jsonl", messages=[CHAT[:2], chat])
    assert good
    with pytest.raises(TaskError, match=message):
        prepare("causal-lm", models("chat"), str(tmp_path))


def test_chats_that_a_template_refuses(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", chat_template="{{ raise_exception('roles must alternate') }}")
    source = table(tmp_path / "rows.jsonl", messages=[CHAT] * 3)
    with pytest.raises(
        TaskError, match=r"must fit the chat template: roles must alternate, got row \d of .*rows.jsonl"
    ):
        prepare("causal-lm", model, source)


def test_chats_need_a_template(tmp_path: Path, models: Callable[[str], str]) -> None:
    source = table(tmp_path / "rows.jsonl", messages=[CHAT] * 3)
    with pytest.raises(TaskError, match=r"chats need a tokenizer with a chat template, got none in .*llama"):
        prepare("causal-lm", models("llama"), source)


def test_sources_and_targets(tmp_path: Path, models: Callable[[str], str]) -> None:
    rows = {"article": ["a long story", "", None], "summary": ["short", "none", "x" * 100]}
    data = prepare("seq2seq", models("t5"), three(tmp_path / "rows", rows), max_length=20)
    assert [text_of(data, row["input_ids"]) for row in data.train] == [
        "<begin>a long story<end>", "<begin><end>", "<begin><end>",
    ]  # fmt: skip
    assert text_of(data, data.train[0]["labels"]) == "<begin>short<end>"
    assert len(data.train[2]["labels"]) == 20
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["labels"].shape == (2, 7)
    assert batch["labels"][1].tolist()[-1] == IGNORED
    assert batch["attention_mask"].sum(1).tolist() == [14, 2]


@pytest.mark.parametrize(
    ("task", "model", "rows", "message"),
    [
        ("causal-lm", "llama", {"prompt": ["a"] * 3, "completion": ["b", None, "c"]},
         r"must have a completion, got none in column 'completion' of row 2 of"),
        ("seq2seq", "t5", {"source": ["a"] * 3, "target": ["b", "", "c"]},
         r"must have a target, got none in column 'target' of row 2 of"),
        ("causal-lm", "llama", {"text": [[1], [2], [3]]}, r"column 'text' must hold text, got List\(.* in"),
        ("causal-lm", "llama", {"text": [None, None, None]},
         r"column 'text' must hold text, got Value\('null'\)"),
        ("causal-lm", "llama", {"text": [0.5, 1.5, 2.5]},
         r"column 'text' must hold text, got Value\('float64'\)"),
        ("causal-lm", "llama", {"text": ["", "", ""]},
         "must fill a block of max_length=512 tokens, got 0 in"),
        ("causal-lm", "llama", {"text": ["short"] * 3},
         "must fill a block of max_length=512 tokens, got 18 in .*; set it to 18 or less"),
        ("token-cls", "tagger", {"tokens": [["a"], ["b"], ["c", "d"]], "tags": [["O"], ["O"], ["O"]]},
         "one tag for each token, got 1 for 2 tokens in row 3 of"),
        ("token-cls", "tagger", {"tokens": ["a", "b", "c"], "tags": [["O"], ["O"], ["O"]]},
         "tokens must be a list of words, got a in row 1 of"),
        ("token-cls", "tagger", {"tokens": [["a"], ["b"], ["c"]], "tags": ["O", "O", "O"]},
         "tags must be a list with a class for each token, got 'O' in column 'tags' of row 1 of"),
    ],
)  # fmt: skip
def test_unusable_texts(
    tmp_path: Path, models: Callable[[str], str], task: Any, model: str, rows: Any, message: str
) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        prepare(task, models(model), three(tmp_path / "rows", rows))
    assert "\n" not in str(caught.value)


def test_numbers_are_text_too(tmp_path: Path, models: Callable[[str], str]) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n" + "1,2\n" * 5)
    data = prepare("causal-lm", models("llama"), str(file))
    assert text_of(data, data.train[0]["input_ids"]) == "1\n2<end>"


def test_longest_rows(tmp_path: Path, models: Callable[[str], str]) -> None:
    source = three(tmp_path / "rows", {"text": ["x" * 3000]})
    assert len(prepare("causal-lm", models("llama"), source).train[0]["input_ids"]) == 512, (
        "the model's maximum"
    )
    with pytest.raises(TaskError, match=r"max_length must be at most 512 for .*llama, got 600"):
        prepare("causal-lm", models("llama"), source, max_length=600)
    long = tmp_path / "long"
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=260, max_position_embeddings=4096)).save_pretrained(long)
    byte_tokenizer().save_pretrained(long)
    assert len(prepare("causal-lm", str(long), source).train[0]["input_ids"]) == 1024
    short = tmp_path / "short"
    llama(short, model_max_length=100)
    assert len(prepare("causal-lm", str(short), source).train[0]["input_ids"]) == 100


# --- classes ---


def labels_of(rows: Any) -> list[int]:
    return [int(row["labels"]) for row in rows]


TEXTS = ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("labels", "features"),
    [
        (["bad", "good", "good", "bad"], None),
        ([" bad", "good ", "good", "bad"], None),
        ([1, 0, 0, 1], ClassLabel(names=["good", "bad"])),
        ([1, 0, 0, 1], ClassLabel(names=["good", "bad", "never used"])),
    ],
)
def test_labels_that_the_model_knows_get_its_numbers(
    tmp_path: Path, models: Callable[[str], str], labels: list[Any], features: Any
) -> None:
    kinds = None if features is None else Features(text=Value("string"), label=features)
    source = three(tmp_path / "rows", {"text": TEXTS, "label": labels}, kinds)
    data = prepare("seq-cls", models("bert"), source, source)
    assert not data.new_head
    assert data.labels == data.keep_labels == ("bad", "good")
    assert labels_of(data.train) == labels_of(data.keep_test) == [0, 1, 1, 0]


@pytest.mark.parametrize("labels", [[3, 9, 0, 3], ["3", "9", "0", "3"], [3.0, 9.0, 0.0, 3.0]])
def test_numbers_match_generic_names(tmp_path: Path, models: Callable[[str], str], labels: list[Any]) -> None:
    images = [np.full((8, 8), value).tolist() for value in (0, 100, 200, 255)]
    data = prepare("image-cls", models("vit"), three(tmp_path / "rows", {"image": images, "label": labels}))
    assert not data.new_head
    assert data.labels is not None
    assert data.labels[3] == "LABEL_3"
    assert labels_of(data.train) == [3, 9, 0, 3]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["b", "a", "c", "a"], ("a", "b", "c"), [1, 0, 2, 0]),
        ([10, 9, -1, 9], ("-1", "9", "10"), [2, 1, 0, 1]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        (["good", "bad", "new", "bad"], ("bad", "good", "new"), [1, 0, 2, 0]),
    ],
)
def test_other_labels_are_new_classes(
    tmp_path: Path, models: Callable[[str], str], labels: Any, classes: Any, numbers: Any
) -> None:
    source = three(tmp_path / "rows", {"text": TEXTS, "label": labels})
    data = prepare("seq-cls", models("bert"), source)
    assert data.new_head
    assert data.labels == classes
    assert data.keep_labels == ("bad", "good")
    assert labels_of(data.train) == numbers


def test_new_classes_keep_the_order_of_the_data(tmp_path: Path, models: Callable[[str], str]) -> None:
    kinds = Features(text=Value("string"), label=ClassLabel(names=["z", "y", "x"]))
    source = three(tmp_path / "rows", {"text": TEXTS, "label": [0, 1, 1, 0]}, kinds)
    assert prepare("seq-cls", models("bert"), source).labels == ("z", "y", "x")


def test_classes_are_those_of_all_splits(tmp_path: Path, models: Callable[[str], str]) -> None:
    source = splits(
        tmp_path / "rows",
        train={"text": TEXTS, "label": ["a", "b", "a", "b"]},
        test={"text": ["x"], "label": ["c"]},
    )
    data = prepare("seq-cls", models("bert"), source, max_train_samples=1)
    assert data.labels == ("a", "b", "c")
    assert labels_of(data.test) == [2]


def test_same_names_twice_are_matched_by_position(tmp_path: Path) -> None:
    """ImageNet has two classes called "crane"."""
    names = [f"class {index}" for index in range(40)]
    model = vit(tmp_path / "model", **named(*names[:39], "class 3"))
    kinds = Features(image=List(List(Value("uint8"))), label=ClassLabel(names=names))
    image = np.zeros((8, 8), np.uint8).tolist()
    source = three(tmp_path / "rows", {"image": [image] * 3, "label": [3, 39, 0]}, kinds)
    data = prepare("image-cls", model, source)
    assert not data.new_head
    assert labels_of(data.train) == [3, 39, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["a", None, "b", "c"],
            "every row must have a label, got None in column 'label' of row 2 of split 'train' of",
        ),
        (["a", "b", " ", "c"], "every row must have a label, got ' ' in column 'label' of row 3 of"),
        ([1.0, math.nan, 0.0, 1.0], "every row must have a label, got nan in column 'label' of row 2 of"),
        ([0.5, 1.0, 2.0, 1.0], "labels must be classes, got the number 0.5 in column 'label' of row 1 of"),
        (
            [[1], [0], [1], [0]],
            r"labels must be one class for each row, got \[1\] in column 'label' of row 1 of",
        ),
        (["a"] * 4, r"must have two classes or more in column 'label', got \['a'\] in"),
        ([None] * 4, "the data must have labels in column 'label', got none in"),
    ],
)
def test_unusable_labels(tmp_path: Path, models: Callable[[str], str], labels: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        prepare("seq-cls", models("bert"), three(tmp_path / "rows", {"text": TEXTS, "label": labels}))
    assert "\n" not in str(caught.value)


def test_errors_name_the_row_of_the_file(tmp_path: Path, models: Callable[[str], str]) -> None:
    """Also where the splits are made by us, and only some rows are used."""
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"t,{'' if row == 77 else row % 2}\n" for row in range(1, 101)))
    with pytest.raises(TaskError, match=r"column 'label' of row 77 of .*rows\.csv$"):
        prepare("seq-cls", models("bert"), str(file), max_train_samples=1, max_eval_samples=1)


def test_errors_name_the_row_of_the_file_in_other_roles_too(
    tmp_path: Path, models: Callable[[str], str]
) -> None:
    answers = [None if row == 77 else "yes" for row in range(1, 101)]
    source = table(tmp_path / "rows.jsonl", prompt=["why"] * 100, completion=answers)
    with pytest.raises(TaskError, match=r"column 'completion' of row 77 of .*rows\.jsonl$"):
        prepare("causal-lm", models("llama"), source)


def test_a_hidden_label_among_others_is_missing(tmp_path: Path, models: Callable[[str], str]) -> None:
    kinds = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    source = three(tmp_path / "rows", {"text": TEXTS, "label": [0, 1, -1, 0]}, kinds)
    with pytest.raises(TaskError, match=r"must have a label, got -1 in column 'label' of row 3 of"):
        prepare("seq-cls", models("bert"), source)


@pytest.mark.parametrize("hidden", [-1, None, "no column"])
def test_splits_without_labels_are_not_used(
    tmp_path: Path, models: Callable[[str], str], hidden: Any
) -> None:
    """As benchmarks publish their test sets."""
    kinds = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    rows = DatasetDict(
        train=Dataset.from_dict({"text": TEXTS * 5, "label": [0, 1] * 10}, kinds),
        test=Dataset.from_dict(
            {"text": ["hidden"] * 4, "label": [None if hidden is None else -1] * 4}, kinds
        ),
    )
    if hidden == "no column":
        rows["test"] = rows["test"].remove_columns("label")
    rows.save_to_disk(str(tmp_path / "rows"))
    data = prepare("seq-cls", models("bert"), str(tmp_path / "rows"))
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)


def test_kept_data_have_the_models_own_labels(tmp_path: Path, models: Callable[[str], str]) -> None:
    target = three(tmp_path / "target", {"text": TEXTS, "label": [5, 6, 7, 5]})
    keep = three(tmp_path / "keep", {"sentence": TEXTS, "label": ["good", "bad", "good", "bad"]})
    data = prepare("seq-cls", models("bert"), target, keep)
    assert data.new_head
    assert data.labels == ("5", "6", "7")
    assert labels_of(data.train) == [0, 1, 2, 0]
    assert labels_of(data.keep_test) == [1, 0, 1, 0]
    strange = three(tmp_path / "strange", {"text": TEXTS, "label": ["good", "bad", "ugly", "bad"]})
    with pytest.raises(
        TaskError, match=r"classes of the model, \['bad', 'good'\], got \['ugly'\] in .*strange"
    ):
        prepare("seq-cls", models("bert"), target, strange)
    with pytest.raises(
        TaskError, match=r"need a model with a trained head for seq-cls, got none in .*bare-bert"
    ):
        prepare("seq-cls", models("bare bert"), target, keep)


def test_pairs_of_texts(tmp_path: Path, models: Callable[[str], str]) -> None:
    rows = {"premise": ["ab", ""], "hypothesis": ["c", "d"], "label": ["bad", "good"]}
    data = prepare("seq-cls", models("bert"), three(tmp_path / "rows", rows))
    assert text_of(data, data.train[0]["input_ids"]) == "<begin>ab<end>c<end>"
    assert data.train[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_row_without_tokens_is_no_gap(tmp_path: Path) -> None:
    """A row that attention leaves out altogether would make the loss NaN."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    model = llama(tmp_path / "model", pad_token=None, model_input_names=names)
    rows = {"text": ["", "some text"], "label": ["a", "b"]}
    data = prepare("seq-cls", model, three(tmp_path / "rows", rows))
    base = load_base_model(data, model)
    scores = measured(data, base.model, data.test, tmp_path / "out")
    assert math.isfinite(scores["nats"])
    assert len(data.train[0]["input_ids"]) == 1
    assert "token_type_ids" not in data.train[0], "the model has no use for them"


def test_classifier_on_a_language_model_reads_the_last_token(
    tmp_path: Path, models: Callable[[str], str]
) -> None:
    rows = {"text": ["ab", "a longer text"], "label": ["a", "b"]}
    data = prepare("seq-cls", models("llama"), three(tmp_path / "rows", rows))
    base = load_base_model(data, models("llama"))
    base.model.eval()
    assert base.head == "score"
    assert base.untrained == ("score",)
    assert base.original_head is None
    with torch.no_grad():
        alone = base.model(**data.collator([data.train[0]])).logits
        padded = base.model(**data.collator([data.train[0], data.train[1]])).logits[:1]
    assert torch.allclose(alone, padded, atol=1e-6)


def test_tags_are_predicted_at_the_first_token_of_a_word(
    tmp_path: Path, models: Callable[[str], str]
) -> None:
    rows = {
        "tokens": [["Ann", "in", "York"], [], ["x" * 200]],
        "ner_tags": [["NAME", "O", "PLACE"], [], ["O"]],
    }
    data = prepare("token-cls", models("tagger"), three(tmp_path / "rows", rows))
    assert len(data.train) == 2, "a row without words has nothing to predict"
    ids, labels = data.train[0]["input_ids"], data.train[0]["labels"]
    assert text_of(data, ids) == "<begin>AnninYork<end>"
    no = IGNORED
    assert labels.tolist() == [no, 1, no, no, 0, no, 2, no, no, no, no]
    assert len(data.train[1]["input_ids"]) == 128


def test_words_follow_a_space_as_in_a_sentence(tmp_path: Path) -> None:
    """Tokenizers that take a space for a part of the next word get it."""
    from tokenizers import pre_tokenizers

    model = bert(tmp_path / "model", BertForTokenClassification, **named("O", "NAME"))
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġi"]
    vocabulary = {name: index for index, name in enumerate(names)}
    RobertaTokenizer(vocab=vocabulary, merges=[("Ġ", "i")]).save_pretrained(model)
    rows = {"tokens": [["Ann", "is"]] * 3, "tags": [["NAME", "O"]] * 3}
    data = prepare("token-cls", model, three(tmp_path / "rows", rows))
    row = data.train[0]
    tokens = data.processor.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["<s>", "Ġ", "A", "n", "n", "Ġi", "s", "</s>"]
    assert row["labels"].tolist() == [IGNORED, 1, IGNORED, IGNORED, IGNORED, 0, IGNORED, IGNORED]


# --- columns ---


@pytest.mark.parametrize(
    ("task", "columns", "given", "message"),
    [
        ("seq-cls", ["a", "b"], {}, r"must have a column 'text', got columns \['a', 'b'\] in"),
        ("seq-cls", ["text", "b"], {}, r"must have a column 'label', got columns \['text', 'b'\] in"),
        ("seq-cls", ["text", "b"], {"label": "c"}, r"must have a column 'c', got columns \['text', 'b'\] in"),
        ("seq-cls", ["text", "b"], {"lable": "b"},
         r"columns of seq-cls must be among text, label, text_pair, got 'lable'"),
        ("seq-cls", ["content", "review", "label"], {},
         r"one column must be the 'text', not each of \['content', 'review'\]"),
        ("causal-lm", ["a"], {},
         r"a column 'messages' or 'prompt' \+ 'completion' or 'text', got columns \['a'\] in"),
        ("causal-lm", ["prompt"], {"prompt": "prompt"},
         r"must have a column 'completion', got columns \['prompt'\]"),
        ("causal-lm", ["text", "prompt", "output"], {},
         r"what describes a row, 'prompt' \+ 'completion' or 'text': name"),
        ("causal-lm", ["text", "chat"], {"text": "text", "messages": "chat"},
         r"must name .* or 'text', got 'text', 'messages'"),
        ("token-cls", ["tokens", "pos_tags", "ner_tags"], {},
         r"one column must be the 'tags', not each of \['ner_tags', 'pos_tags'\]"),
        ("image-cls", ["img", "coarse"], {},
         r"must have a column 'label', got columns \['img', 'coarse'\] in"),
        ("seq2seq", ["source"], {}, r"must have a column 'target', got columns \['source'\] in"),
    ],
)  # fmt: skip
def test_missing_and_ambiguous_columns(task: str, columns: Any, given: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        tasks.columns.find_columns(task, columns, given, "x.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "columns", "given", "found"),
    [
        ("seq-cls", ["Sentence", "Label"], {}, {"text": "Sentence", "label": "Label"}),
        ("seq-cls", ["text", "content", "label", "labels"], {}, {"text": "text", "label": "label"}),
        ("seq-cls", ["a", "label", "text"], {"text": "a"}, {"text": "a", "label": "label"}),
        ("seq-cls", ["question1", "question2", "target"], {},
         {"text": "question1", "text_pair": "question2", "label": "target"}),
        ("causal-lm", ["prompt", "messages", "id"], {}, {"messages": "messages"}),
        ("causal-lm", ["query", "response", "type"], {}, {"prompt": "query", "completion": "response"}),
        ("causal-lm", ["instruction", "input", "output"], {},
         {"prompt": "instruction", "context": "input", "completion": "output"}),
        ("causal-lm", ["text", "question", "answer"], {"text": "text"}, {"text": "text"}),
        ("causal-lm", ["text", "question", "answer"], {"prompt": "question"},
         {"prompt": "question", "completion": "answer"}),
        ("image-cls", ["img", "fine_label", "coarse_label"], {}, {"image": "img", "label": "fine_label"}),
        ("seq2seq", ["document", "summary"], {}, {"source": "document", "target": "summary"}),
    ],
)  # fmt: skip
def test_columns_that_are_found(task: str, columns: Any, given: Any, found: Any) -> None:
    assert tasks.columns.find_columns(task, columns, given, "x.csv") == found


def test_columns_of_kept_data(tmp_path: Path, models: Callable[[str], str]) -> None:
    """The target's names are used where they exist."""
    target = three(tmp_path / "target", {"a": TEXTS, "b": ["bad", "good"] * 2})
    same = three(tmp_path / "same", {"a": TEXTS, "b": ["good", "good"] * 2, "text": TEXTS})
    other = three(tmp_path / "other", {"text": TEXTS, "label": ["bad", "bad"] * 2})
    columns = {"text": "a", "label": "b"}
    model = models("bert")
    assert labels_of(prepare("seq-cls", model, target, same, columns=columns).keep_test) == [1] * 4
    assert labels_of(prepare("seq-cls", model, target, other, columns=columns).keep_test) == [0] * 4
    with pytest.raises(TaskError, match=r"must have a column 'c', got columns .* in .*other"):
        prepare("seq-cls", model, target, other, columns=columns, keep_columns={"text": "c"})


def test_every_split_has_the_columns(tmp_path: Path, models: Callable[[str], str]) -> None:
    rows = {"text": TEXTS, "label": ["bad", "good"] * 2}
    source = splits(tmp_path / "rows", train=rows, test={"words": TEXTS, "label": ["bad", "good"] * 2})
    with pytest.raises(
        TaskError, match=r"every split must have a column 'text', got columns .* in split 'test' of"
    ):
        prepare("seq-cls", models("bert"), source)


# --- samples ---


def test_samples_are_drawn_by_seed(tmp_path: Path, models: Callable[[str], str]) -> None:
    source = table(tmp_path / "rows.jsonl", text=[f"{n}" for n in range(100)], label=["bad", "good"] * 50)

    def drawn(**options: Any) -> list[str]:
        data = prepare(
            "seq-cls", models("bert"), source, source, max_train_samples=10, max_eval_samples=4, **options
        )
        assert [len(data.train), len(data.validation), len(data.test)] == [10, 4, 4]
        assert data.keep_test is not None
        assert len(data.keep_test) == 4
        for row in data.train:  # labels stay with their rows
            number = int(text_of(data, row["input_ids"]).removeprefix("<begin>").removesuffix("<end>"))
            assert int(row["labels"]) == number % 2
        return [text_of(data, row["input_ids"]) for row in data.train]

    assert drawn() == drawn(seed=0) != drawn(seed=1)


def test_samples_of_plain_text_are_blocks(tmp_path: Path, models: Callable[[str], str]) -> None:
    source = three(tmp_path / "rows", {"text": ["".join(chr(97 + n % 26) for n in range(300))]})
    data = prepare(
        "causal-lm", models("llama"), source, max_length=8, max_train_samples=3, max_eval_samples=5
    )
    assert len(data.train) == 3
    assert len(data.test) == 5
    starts = [int(row["input_ids"][0]) for row in data.train]
    assert len(set(starts)) == 3
    assert all(len(row["input_ids"]) == 8 for row in data.train)


# --- images ---


def test_images_of_all_kinds(tmp_path: Path, models: Callable[[str], str]) -> None:
    """Sizes and modes, as gray and as colour."""
    folder = tmp_path / "images"
    colour = Image.new("RGBA", (20, 12), (200, 100, 50, 128))
    kinds = {
        "gray.png": colour.convert("L"),
        "colour.jpg": colour.convert("RGB"),
        "transparent.png": colour,
        "palette.gif": colour.convert("RGB").convert("P"),
        "bits.png": Image.new("1", (9, 9), 1),
        "gray-alpha.png": colour.convert("LA"),
        "print.jpg": colour.convert("RGB").convert("CMYK"),
        "deep.png": Image.fromarray(np.full((5, 7), 128 * 257, np.uint16)),
        "large.webp": colour.convert("RGB").resize((300, 200)),
    }
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([value for index in range(256) for value in (index, index, index)])
    for label in ("0", "1"):
        (folder / label).mkdir(parents=True)
        for name, image in kinds.items():
            image.save(folder / label / name)
        palette.save(folder / label / "see-through.png", transparency=bytes([0, 10, 20, 30]))
    for model, channels in (("vit", 1), ("colours", 3)):
        data = prepare("image-cls", models(model), str(folder))
        rows = [row for part in (data.train, data.validation, data.test) for row in part]
        assert len(rows) == 20
        assert all(row["pixel_values"].shape == (channels, 8, 8) for row in rows)
        assert all(row["pixel_values"].isfinite().all() for row in rows)


def test_pixels_are_what_the_processor_says(tmp_path: Path, models: Callable[[str], str]) -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for kind, image in {
        "picture": Image.fromarray(values),
        "bytes": {"bytes": png(values), "path": None},
        "numbers": values.tolist(),
        "channel first": values[None].tolist(),
        "floats": values.astype(float).tolist(),
    }.items():
        source = three(tmp_path / kind, {"image": [image] * 3, "label": [0, 1, 2]})
        pixels = prepare("image-cls", models("vit"), source).train[0]["pixel_values"]
        assert torch.allclose(pixels[0], torch.tensor(values / 127.5 - 1, dtype=torch.float32), atol=1e-6), (
            kind
        )


def png(values: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


def test_images_are_upright(tmp_path: Path, models: Callable[[str], str]) -> None:
    """As cameras mean them."""
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for name in "345":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(values[::-1, ::-1].copy()).save(tmp_path / "images" / name / "1.png", exif=exif)
    data = prepare("image-cls", models("vit"), str(tmp_path / "images"))
    expected = torch.tensor(values / 127.5 - 1, dtype=torch.float32)
    assert torch.allclose(data.train[0]["pixel_values"][0], expected, atol=1e-6)


def test_deep_gray_is_scaled(tmp_path: Path, models: Callable[[str], str]) -> None:
    image = Image.fromarray(np.full((8, 8), 51 * 257, np.uint16))
    data = prepare(
        "image-cls", models("vit"), three(tmp_path / "rows", {"image": [image] * 3, "label": [0, 1, 2]})
    )
    assert torch.allclose(data.train[0]["pixel_values"], torch.tensor(51 / 127.5 - 1), atol=1e-6)


def test_large_sets_are_processed_on_demand(
    tmp_path: Path, models: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pictures(tmp_path / "images", 12, ("3", "5"))
    kept = prepare("image-cls", models("vit"), source)
    monkeypatch.setattr("nblora.tasks.images.IN_MEMORY", 0)
    data = prepare("image-cls", models("vit"), source)
    assert isinstance(data.train, ImageRows)
    assert not isinstance(kept.train, ImageRows)
    restored = pickle.loads(pickle.dumps(data)).train
    for rows in (data.train, restored):
        assert len(rows) == len(kept.train)
        for index in range(len(rows)):
            assert torch.equal(rows[index]["pixel_values"], kept.train[index]["pixel_values"])
            assert torch.equal(rows[index]["labels"], kept.train[index]["labels"])


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_images(tmp_path: Path, models: Callable[[str], str], content: bytes | None) -> None:
    source = pictures(tmp_path / "images", 12, ("3", "5"))
    broken = tmp_path / "images" / "3" / "4.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(TaskError, match=r"images must be readable: .*, got row 4 of .*images") as caught:
        prepare("image-cls", models("vit"), source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(broken)) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            ["a.png"] * 3,
            r"column 'image' must hold images, got Value\('string'\) in .* for image files use a folder",
        ),
        ([1, 2, 3], r"column 'image' must hold images, got Value\('int64'\) in"),
        ([[[0, 300]]] * 3, "integers from 0 to 255, got 0 to 300, got row 1 of"),
        ([[[0.5, 1.0]]] * 3, "integers from 0 to 255, got 0.5 to 1, got row 1 of"),
        ([[[0, 1]], None, [[0, 1]]], "every row must have an image, got None, got row 2 of"),
        ([[[[[0]]]]] * 3, r"1, 3 or 4 channels, got numbers of shape \(1, 1, 1, 1\)"),
    ],
)
def test_unusable_images(tmp_path: Path, models: Callable[[str], str], images: Any, message: str) -> None:
    source = three(tmp_path / "rows", {"image": images, "label": [0, 1, 2]})
    with pytest.raises(TaskError, match=message):
        prepare("image-cls", models("vit"), source)


def test_a_model_without_image_processor_gets_a_plain_one(tmp_path: Path) -> None:
    model = vit(tmp_path / "model", num_labels=10)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    images = [Image.new("L", (30, 20), value) for value in (0, 51, 255)]
    data = prepare("image-cls", model, three(tmp_path / "rows", {"image": images, "label": [0, 1, 2]}))
    assert data.train[0]["pixel_values"].shape == (1, 8, 8)
    assert [float(row["pixel_values"].mean()) for row in data.train] == pytest.approx([-1, -0.6, 1], abs=1e-6)


def test_a_colour_processor_for_a_gray_model(tmp_path: Path) -> None:
    model = vit(tmp_path / "model", num_labels=10)
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6], image_std=[0.5] * 3
    ).save_pretrained(model)
    images = [Image.new("RGB", (8, 8))] * 3
    data = prepare("image-cls", model, three(tmp_path / "rows", {"image": images, "label": [0, 1, 2]}))
    assert torch.allclose(data.train[0]["pixel_values"], torch.tensor(-1.0))


# --- models ---


def test_a_new_head_beside_the_original_one(tmp_path: Path) -> None:
    """The number of classes is the same, so that the trained head could be taken for the new one."""
    model = vit(tmp_path / "model", **named("cat", "dog"))
    trained = ViTForImageClassification.from_pretrained(model)
    data = prepare("image-cls", model, pictures(tmp_path / "images", labels=("car", "bus")))
    assert data.new_head
    assert data.labels == ("bus", "car")
    torch.manual_seed(0)
    base = load_base_model(data, model)
    assert base.head == "classifier"
    assert base.untrained == ("classifier",)
    new = base.model.get_submodule("classifier")
    assert base.original_head is not None
    assert torch.equal(base.original_head.weight, trained.classifier.weight)
    assert not torch.equal(new.weight, trained.classifier.weight)
    assert 0.5 < new.weight.std().item() / base.model.config.initializer_range < 2
    assert not new.bias.any()
    for (name, ours), (_, theirs) in zip(base.model.vit.named_parameters(), trained.vit.named_parameters()):
        assert torch.equal(ours, theirs), name
    assert base.model.config.id2label == {0: "bus", 1: "car"}
    assert base.model.config.label2id == {"bus": 0, "car": 1}
    torch.manual_seed(0)
    assert torch.equal(load_base_model(data, model).model.get_submodule("classifier").weight, new.weight)
    scores = measured(data, base.model, data.test, tmp_path / "out")
    assert math.isfinite(scores["nats"])


@pytest.mark.parametrize("classes", [2, 5])
def test_a_new_head_of_another_size_trains(
    tmp_path: Path, models: Callable[[str], str], classes: int
) -> None:
    labels = [f"c{index % classes}" for index in range(20)]
    data = prepare("seq-cls", models("bert"), table(tmp_path / "rows.jsonl", text=labels, label=labels))
    base = load_base_model(data, models("bert"), dtype=torch.bfloat16)
    assert base.model.get_submodule("classifier").weight.shape == (classes, 16)
    assert base.model.get_submodule("classifier").weight.dtype == torch.bfloat16
    assert base.model.config.num_labels == base.model.num_labels == classes
    trainer_for(data, base, tmp_path / "out").train()


@pytest.mark.parametrize(
    ("task", "model"), [("seq-cls", "bare bert"), ("image-cls", "bare vit"), ("seq-cls", "llama")]
)
def test_a_model_without_head_gets_one(
    tmp_path: Path, models: Callable[[str], str], task: Any, model: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Even where the configuration's two classes are like those of the data."""
    source = (
        pictures(tmp_path / "images", labels=("0", "1"))
        if task == "image-cls"
        else table(tmp_path / "rows.jsonl", text=TEXTS, label=[0, 1, 0, 1])
    )
    data = prepare(task, models(model), source)
    assert data.new_head
    assert data.keep_labels is None
    base = load_base_model(data, models(model))
    assert base.original_head is None
    assert base.untrained == (base.head,)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_heads_of_another_kind(tmp_path: Path, kind: str) -> None:
    """A regression has no classes; one class of several is learned whatever the model was trained for."""
    config = {"num_labels": 1} if kind == "regression" else named("bad", "good")
    model = bert(tmp_path / "model", problem_type=kind, **config)
    data = prepare("seq-cls", model, table(tmp_path / "rows.jsonl", text=TEXTS, label=["bad", "good"] * 2))
    assert data.new_head == (kind == "regression")
    assert data.keep_labels == (None if kind == "regression" else ("bad", "good"))
    base = load_base_model(data, model)
    assert base.untrained == (("classifier",) if data.new_head else ())
    assert base.model.get_submodule("classifier").weight.shape == (2, 16)
    scores = trainer_for(data, base, tmp_path / "out").evaluate(data.test)
    assert scores["eval_loss"] == pytest.approx(scores["eval_nats"], rel=1e-5)


def test_all_that_starts_at_random_is_told(tmp_path: Path) -> None:
    """DistilBERT has a layer before its classifier that language models lack."""
    folder = tmp_path / "model"
    config = DistilBertConfig(vocab_size=260, dim=16, hidden_dim=16, n_layers=3, n_heads=2)
    DistilBertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    data = prepare("seq-cls", str(folder), table(tmp_path / "rows.jsonl", text=TEXTS, label=[0, 1, 0, 1]))
    base = load_base_model(data, str(folder))
    assert base.head == "classifier"
    assert base.untrained == ("classifier", "pre_classifier")


def test_checkpoints_without_weights_are_refused(tmp_path: Path, models: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    model = vit(tmp_path / "model", **named("cat", "dog"))
    data = prepare("image-cls", model, pictures(tmp_path / "images"))
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, file, {"format": "pt"})
    with pytest.raises(TaskError, match=r"must have weights for 'classifier', got none in .*model"):
        load_base_model(data, model)
    save_file({k: v for k, v in weights.items() if "classifier" in k}, file, {"format": "pt"})
    with pytest.raises(
        TaskError, match=r"must have weights for ViTFor.*, got none for \d+ of \d+ parameters in"
    ):
        load_base_model(data, model)


def head_of(config: Any, kind: str) -> str | None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    assert tasks.models._find_head(model, 9) is None, "a head has an output for each class"
    return tasks.models._find_head(model, 7)


def test_heads_are_found_by_shape() -> None:
    import transformers as t

    small = {"num_labels": 7}
    assert head_of(t.RobertaConfig(**SIZES, **small), "RobertaForSequenceClassification") == "classifier"
    assert head_of(t.RobertaConfig(**SIZES, **small), "RobertaForTokenClassification") == "classifier"
    assert (
        head_of(t.GPT2Config(n_embd=16, n_layer=1, n_head=2, **small), "GPT2ForSequenceClassification")
        == "score"
    )
    assert head_of(t.LlamaConfig(**SIZES, **small), "LlamaForTokenClassification") == "score"
    assert head_of(t.Qwen2Config(**SIZES, **small), "Qwen2ForSequenceClassification") == "score"
    t5 = t.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **small)
    assert head_of(t5, "T5ForSequenceClassification") == "classification_head"
    assert head_of(t.DebertaV2Config(**SIZES, **small), "DebertaV2ForSequenceClassification") == "classifier"
    assert (
        head_of(t.DistilBertConfig(dim=24, n_layers=1, **small), "DistilBertForSequenceClassification")
        == "classifier"
    )
    assert (
        head_of(t.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], **small), "ConvNextForImageClassification")
        == "classifier"
    )
    assert (
        head_of(t.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], **small), "ResNetForImageClassification")
        == "classifier"
    )
    assert (
        head_of(t.SwinConfig(depths=[1], num_heads=[1], embed_dim=8, **small), "SwinForImageClassification")
        == "classifier"
    )
    assert (
        head_of(t.Dinov2Config(num_hidden_layers=1, **small), "Dinov2ForImageClassification") == "classifier"
    )


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (
            "seq-klass",
            "bert",
            "task must be one of causal-lm, seq-cls, token-cls, seq2seq, image-cls, got 'seq-klass'",
        ),
        ("seq2seq", "llama", "the model must be made for seq2seq, got a 'llama' model in"),
        ("image-cls", "bert", "the model must be made for image-cls, got a 'bert' model in"),
        ("causal-lm", "missing", "the model must be a folder or a hub name, got /no/such/model: "),
    ],
)
def test_models_that_do_not_fit(
    tmp_path: Path, models: Callable[[str], str], task: Any, model: str, message: str
) -> None:
    name = "/no/such/model" if model == "missing" else models(model)
    with pytest.raises(TaskError, match=message) as caught:
        prepare(task, name, table(tmp_path / "rows.jsonl", text=TEXTS))
    assert "\n" not in str(caught.value)


def test_models_without_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=260)).save_pretrained(folder)
    with pytest.raises(TaskError, match=r"the model must have a tokenizer, got .*model: ") as caught:
        prepare("causal-lm", str(folder), table(tmp_path / "rows.jsonl", text=TEXTS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("max_length", 1, 2), ("max_train_samples", 0, 1), ("max_eval_samples", -1, 1)],
)
def test_limits_are_checked_first(option: str, value: int, least: int) -> None:
    limits: dict[str, Any] = {option: value}
    with pytest.raises(TaskError, match=f"{option} must be at least {least}, got {value}"):
        prepare("causal-lm", "missing", "missing", **limits)


def test_indices_outside_are_refused(tmp_path: Path, models: Callable[[str], str]) -> None:
    """So that iteration over rows ends."""
    data = prepare(
        "causal-lm", models("llama"), three(tmp_path / "rows", {"text": ["x" * 100]}), max_length=10
    )
    assert len([*data.train]) == len(data.train) == 10
    with pytest.raises(IndexError, match="from 0 to 9, got 10"):
        data.train[10]
