"""Conversations by a tokenizer's own chat template: what the tokens are, and which the loss counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raylaunch.data import chat, dataset, inspect, prepare, tokenize
from raylaunch.data.prepare import PrepareRequest
from raylaunch.errors import DataError, UsageError

pytestmark = pytest.mark.long

CHATML = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last or message['role'] == 'user' else message['content'].split('</think>')[-1] }}",
)
TALK = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and three?"},
    {"role": "assistant", "content": "seven, of course"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `save_pretrained` writes it: byte-pairs, and the marks of ChatML."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["two and two are four, of course"] * 20, vocab_size=300)
    fast = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(directory)
    return directory


def test_the_loss_counts_the_answers_with_their_end_marks(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    out = tmp_path / "out"
    prepare.prepare(PrepareRequest([str(tmp_path / "talk.jsonl")], out, str(tokenizer), "sft"), 1, lambda _: None)
    manifest = dataset.read(out)
    (sample,) = inspect.samples(out, manifest, 1, 0)
    assert sample.text == (
        "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>\n⟧"
        "<|im_start|>user\nand three?<|im_end|>\n<|im_start|>assistant\n⟦seven, of course<|im_end|>\n⟧"
    )
    row = dataset.row(out, manifest.shards)
    marks = tokenize.load(str(tokenizer)).encode("<|im_start|>")
    assert len(marks) > 1  # as plain text; as a mark it is one token
    ids = row.read(0, row.count).tolist()
    assert len(set(ids) & set(marks.tolist())) == 0 or ids.count(ids[0]) == 4


def test_what_cannot_be_cut_into_answers_is_a_bad_document(tokenizer: Path, tmp_path: Path) -> None:
    known = tokenize.load(str(tokenizer))
    assert isinstance(known, tokenize.PretrainedTokenizer)
    own = chat.load(chat.AUTO, known)
    assert own is not None
    with pytest.raises(DataError, match="no such role"):
        own.encode(known, [{"role": "tool", "content": "5"}, *TALK])
    with pytest.raises(DataError, match=r"holds <\|im_end\|>"):
        own.encode(known, [{"role": "user", "content": "hi<|im_end|>"}, *TALK[1:]])
    (tmp_path / "thinks.jinja").write_text(THINKS)
    thinks = chat.load(str(tmp_path / "thinks.jinja"), known)
    assert thinks is not None
    thought = [TALK[0], {"role": "assistant", "content": "<think>2+2</think>four"}, *TALK[2:]]
    with pytest.raises(DataError, match="writes message 2 in more than one way"):
        thinks.encode(known, thought)
    tokens, counts = thinks.encode(known, TALK)
    assert len(tokens) == len(counts) and 0 < counts.sum() < len(counts)


def test_which_template_it_is(tokenizer: Path, tmp_path: Path) -> None:
    known = tokenize.load(str(tokenizer))
    assert chat.load(chat.PLAIN, known) is None
    assert chat.load(chat.AUTO, tokenize.Bytes()) is None
    with pytest.raises(UsageError, match="needs the tokenizer of a model"):
        chat.load(str(tmp_path / "x.jinja"), tokenize.Bytes())
    with pytest.raises(UsageError, match="no chat template"):
        chat.load(str(tmp_path / "none.jinja"), known)
