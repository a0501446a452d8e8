"""Text: rows of token ids, from texts, pairs, prompts, chats and tagged words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from nblora.data import draw, one_line, quietly
from nblora.tasks.columns import Piece
from nblora.tasks.kinds import TaskError, model_errors
from nblora.tasks.rows import IGNORED, Collator, Ragged, TensorRows

LONGEST = 1024  # tokens of a row, unless the caller asks for more
AT_ONCE = 1000  # rows that are tokenised together

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # of chats with "from" and "value"

Inputs = dict[str, list[Any]]


class TextProcess:
    """Makes rows of token ids.

    Attributes:
        processor: the tokenizer.
        collator: pads with the model's padding token.
        max_length: of a row or a block, in tokens.
    """

    def __init__(self, task: str, model: str, config: Any, max_length: int | None) -> None:
        self.task = task
        self.model = model
        self.processor = _load_tokenizer(model, task)
        self.max_length = _max_length(config, self.processor, max_length, model)
        text = config.get_text_config()
        self._token_types = (getattr(text, "type_vocab_size", 0) or 0) > 1
        self._filler = _filler(text, self.processor)
        self.collator = Collator({"input_ids": self._filler, "token_type_ids": 0, "labels": IGNORED})

    def __call__(self, piece: Piece, limit: int | None, seed: int) -> TensorRows:
        """The rows of a piece, at most `limit` of them.

        Raises:
            TaskError: if a row is not what its role asks for, or there is nothing to predict.
        """
        with quietly():
            if self.task == "causal-lm" and "text" in piece.columns:
                return self._blocks(piece, limit, seed)
            piece = piece.sample(limit, seed=seed)
            encode: Callable[[Piece, int, Inputs], Inputs]
            if self.task == "seq-cls":
                encode = self._texts
            elif self.task == "token-cls":
                encode = self._tags
            elif self.task == "seq2seq":
                encode = self._pairs
            else:
                encode = self._chats if "messages" in piece.columns else self._completions
            for role, column in piece.columns.items():
                if role not in ("messages", "tokens"):
                    _require_text(piece, column)
            found: dict[str, list[Any]] = {}
            for start, batch in piece.batches(AT_ONCE):
                for name, values in encode(piece, start, batch).items():
                    found.setdefault(name, []).extend(np.asarray(value, np.int32) for value in values)
        if self.task == "seq-cls":
            columns: dict[str, Tensor | Ragged] = {name: Ragged.of(values) for name, values in found.items()}
            return TensorRows({**columns, "labels": torch.tensor(piece.labels)})
        # nothing comes before the first token of a text to predict it from
        first = 1 if self.task == "causal-lm" else 0
        useful = [bool((labels[first:] != IGNORED).any()) for labels in found["labels"]]
        if not any(useful):
            raise TaskError(
                f"rows must have a token to predict within max_length={self.max_length}, got none in the "
                f"{piece.purpose} rows of {piece.place}"
            )
        return TensorRows(
            {
                name: Ragged.of([value for value, used in zip(values, useful) if used])
                for name, values in found.items()
            }
        )

    def _texts(self, piece: Piece, start: int, batch: Inputs) -> Inputs:
        pairs = [_strings(batch["text_pair"])] if "text_pair" in batch else []
        return self._inputs(self._encode(_strings(batch["text"]), *pairs))

    def _tags(self, piece: Piece, start: int, batch: Inputs) -> Inputs:
        assert piece.labels is not None
        tags = piece.labels[start : start + AT_ONCE]
        for position, (words, classes) in enumerate(zip(batch["tokens"], tags), start):
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise TaskError(
                    f"tokens must be a list of words, got {str(words)[:80]} in {piece.where(position)}"
                )
            if len(words) != len(classes):
                raise TaskError(
                    f"a row must have one tag for each token, got {len(classes)} for {len(words)} tokens in "
                    f"{piece.where(position)}"
                )
        encoded = self._encode(batch["tokens"], is_split_into_words=True)
        labels = []
        for position, classes in enumerate(tags):
            words = encoded.word_ids(position)
            firsts = [word is not None and word != before for word, before in zip(words, [None, *words])]
            labels.append([classes[word] if first else IGNORED for word, first in zip(words, firsts)])
        return {**self._inputs(encoded, filled=False), "labels": labels}

    def _pairs(self, piece: Piece, start: int, batch: Inputs) -> Inputs:
        _require_all(piece, start, batch, "target")
        encoded = self._inputs(self._encode(_strings(batch["source"])))
        targets = self._encode(text_target=_strings(batch["target"]))
        return {"input_ids": encoded["input_ids"], "labels": targets["input_ids"]}

    def _completions(self, piece: Piece, start: int, batch: Inputs) -> Inputs:
        _require_all(piece, start, batch, "completion")
        prompts, completions = _strings(batch["prompt"]), _strings(batch["completion"])
        for more in [_strings(batch["context"])] if "context" in batch else []:
            prompts = [f"{prompt}\n\n{text}" if text else prompt for prompt, text in zip(prompts, more)]
        # "What is 2 + 2?" and "4" are not to be one word
        prompts = [
            f"{prompt}\n" if re.search(r"\S\Z", prompt) and not completion[0].isspace() else prompt
            for prompt, completion in zip(prompts, completions)
        ]
        heads = self._encode(prompts, truncation=False)["input_ids"]
        tails = self._encode(completions, truncation=False, add_special_tokens=False)["input_ids"]
        end = [] if self.processor.eos_token_id is None else [self.processor.eos_token_id]
        rows, labels = [], []
        for head, tail in zip(map(self._without_end, heads), tails):
            rows.append([*head, *tail, *end][: self.max_length])
            labels.append([*[IGNORED] * len(head), *tail, *end][: self.max_length])
        return {"input_ids": rows, "labels": labels}

    def _chats(self, piece: Piece, start: int, batch: Inputs) -> Inputs:
        if not self.processor.chat_template:
            raise TaskError(f"chats need a tokenizer with a chat template, got none in {self.model}")
        with model_errors(f"chats need a tokenizer with one chat template, got {self.model}"):
            marked = _GENERATION.search(self.processor.get_chat_template()) is not None
        rows, labels = [], []
        for position, chat in enumerate(batch["messages"], start):
            messages = _messages(chat, piece.where(position))
            try:
                encoded = self.processor.apply_chat_template(
                    messages,
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=marked,
                )
            except ImportError:
                raise  # of Jinja, which the user can mend
            except Exception as error:  # templates raise what they like
                raise TaskError(
                    f"a chat must fit the chat template: {one_line(error)}, got {piece.where(position)}"
                ) from error
            tokens = encoded["input_ids"]
            mask = encoded["assistant_masks"] if marked else [1] * len(tokens)
            rows.append(tokens[: self.max_length])
            labels.append([token if used else IGNORED for token, used in zip(rows[-1], mask)])
        return {"input_ids": rows, "labels": labels}

    def _blocks(self, piece: Piece, limit: int | None, seed: int) -> TensorRows:
        """Documents one after another, an end token after each, cut into blocks."""
        _require_text(piece, piece.columns["text"])
        end = self.processor.eos_token_id
        pieces: list[Any] = []
        before: Any = None
        passages = len(piece.rows.column_names) > 1  # of text files
        for start, batch in piece.batches(AT_ONCE):
            texts = _strings(batch["text"])
            places: list[Any] = [None] * len(texts)
            inner = whole = self._encode(texts, truncation=False)["input_ids"]
            if passages:
                rows = piece.rows[start : start + AT_ONCE]
                places = list(zip(rows["document"], rows["passage"]))
                if self.processor.num_special_tokens_to_add():
                    inner = self._encode(texts, truncation=False, add_special_tokens=False)["input_ids"]
            for text, place, alone, continued in zip(texts, places, whole, inner):
                if not text:
                    continue
                goes_on = place is not None and before == (place[0], place[1] - 1)
                if pieces and not goes_on and end is not None:
                    pieces.append([end])
                pieces.append(self._without_end(continued if goes_on else alone))
                before = place
        if pieces and end is not None:
            pieces.append([end])
        tokens = Ragged.of([np.asarray(some, np.int32) for some in pieces]).values
        length = self.max_length
        full = len(tokens) // length
        if piece.purpose == "train":
            if not full:
                hint = f"; set it to {len(tokens)} or less" if len(tokens) > 1 else ""
                raise TaskError(
                    f"the text to train on must fill a block of max_length={length} tokens, got "
                    f"{len(tokens)} in {piece.place}{hint}"
                )
            tokens = tokens[: full * length]
        elif len(tokens) < 2:
            raise TaskError(
                f"the text must have a token to predict, got none in the {piece.purpose} rows of "
                f"{piece.place}"
            )
        elif len(tokens) == full * length + 1:
            tokens = tokens[:-1]  # a block of one token has nothing to predict it from
        starts = torch.tensor([*range(0, len(tokens), length), len(tokens)])
        blocks = Ragged(tokens, starts)
        if limit is not None and limit < len(blocks):
            blocks = Ragged.of([blocks[int(block)].numpy() for block in draw(len(blocks), limit, seed=seed)])
        return TensorRows({"input_ids": blocks, "labels": blocks})

    def _encode(self, *texts: Any, truncation: bool = True, **options: Any) -> Any:
        if truncation:
            options |= {"truncation": True, "max_length": self.max_length}
        return self.processor(*texts, **options)

    def _inputs(self, encoded: Any, *, filled: bool = True) -> Inputs:
        """What the model takes of a tokenizer's output; a row without tokens gets one, to be no gap."""
        found = {"input_ids": encoded["input_ids"]}
        if self._token_types and "token_type_ids" in encoded:
            found["token_type_ids"] = encoded["token_type_ids"]
        if not filled:
            return found
        empty = {"input_ids": [self._filler], "token_type_ids": [0]}
        return {name: [row or empty[name] for row in rows] for name, rows in found.items()}

    def _without_end(self, tokens: list[int]) -> list[int]:
        """Tokens of a text that goes on; some tokenizers close every text."""
        closing = {self.processor.eos_token_id, self.processor.sep_token_id} - {None}
        count = len(tokens)
        while count and tokens[count - 1] in closing:
            count -= 1
        return tokens[:count]


def _strings(values: Sequence[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]


def _require_text(piece: Piece, column: str) -> None:
    feature = piece.rows.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string", "int64", "int32"):
        raise TaskError(f"column {column!r} must hold text, got {feature} in {piece.place}")


def _require_all(piece: Piece, start: int, batch: Inputs, role: str) -> None:
    """Nothing that is to be predicted may be missing."""
    for position, value in enumerate(batch[role], start):
        if value is None or value == "":
            raise TaskError(
                f"every row must have a {role}, got none in column {piece.columns[role]!r} of "
                f"{piece.where(position)}"
            )


def _messages(chat: Any, where: str) -> list[dict[str, Any]]:
    """A chat as a list of messages with a role and a content."""
    if not isinstance(chat, list) or not chat or not all(isinstance(message, dict) for message in chat):
        raise TaskError(f"a chat must be a list of messages, got {str(chat)[:80]} in {where}")
    found = []
    for message in chat:
        if not message.get("role") and message.get("from"):
            speaker = message["from"]
            message = {"role": _SPEAKERS.get(speaker, speaker), "content": message.get("value")}
        if not message.get("role"):
            raise TaskError(f"every message must have a 'role', got {str(message)[:80]} in {where}")
        found.append(message)
    return found


def _load_tokenizer(model: str, task: str) -> Any:
    with quietly(), model_errors(f"the model must have a tokenizer, got {model}"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        if task == "token-cls":
            if not tokenizer.is_fast:
                raise TaskError(
                    f"token-cls needs a fast tokenizer, got {type(tokenizer).__name__} in {model}"
                )
            if getattr(tokenizer, "add_prefix_space", None) is False:
                # words come one by one, but those inside a sentence follow a space
                tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
    return tokenizer


def _max_length(config: Any, tokenizer: Any, asked: int | None, model: str) -> int:
    text = config.get_text_config()
    limits = [LONGEST] if asked is None else []
    if tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length)
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if positions and not hasattr(text, "relative_attention_num_buckets"):
        # RoBERTa and its kin count positions from the padding token on
        from_padding = "roberta" in text.model_type or text.model_type == "camembert"
        limits.append(positions - (text.pad_token_id + 1 if from_padding else 0))
    if asked is None:
        return int(min(limits))
    if asked > min(limits, default=asked):
        raise TaskError(f"max_length must be at most {min(limits)} for {model}, got {asked}")
    return asked


def _filler(text_config: Any, tokenizer: Any) -> int:
    """A token to fill up with; any will do, since attention and loss leave it out."""
    for token in (text_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and token >= 0:
            return token
    return 0
