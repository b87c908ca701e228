"""Packed rows: labels, positions and seq_idx by hand, and the loss of the documents apart."""

import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import IGNORE_INDEX, check_example, select_rows, text_message
from bestiary.shared.core.protocols import StepContext
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.language.processor import TextProcessor
from bestiary.shared.losses.causal_lm import CausalLM as NextToken

PAD, EOS = 256, 257


def row(tokens, documents=None, name="row", key="byte"):
    example = {"id": name, "meta": {"tokenizer": key}, "tokens": np.array(tokens)}
    if documents is not None:
        example["documents"] = np.array(documents, np.int32)
    return check_example(example)


def process(*examples, mode="train", **options):
    return TextProcessor(ByteTokenizer(), **options)(examples, mode)


def test_a_packed_row_by_hand():
    """The end of a document, a whole one, and the beginning of a third."""
    batch = process(row([5, 6, EOS, 7, 8, EOS, 9], [0, 0, 1, 1, 1, 2, 2]))
    assert batch["input_ids"].tolist() == [[5, 6, EOS, 7, 8, EOS, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 7]
    # The end-of-text token opens a document, and is foretold by the last token of the one before.
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert batch["seq_idx"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[5, 6, EOS, 7, 8, EOS, 9]]


def test_a_first_token_that_nothing_foretells_has_no_label():
    """Documents that do not begin with the end-of-text token."""
    batch = process(row([5, 6, 7, 8, EOS, 9], [0, 0, 1, 1, 2, 2]))
    assert batch["labels"].tolist() == [[5, 6, IGNORE_INDEX, 8, EOS, 9]]
    with pytest.raises(BadDataError, match="'row' has no token to learn"):
        process(row([5, 6], [0, 1]))


def test_plain_concatenation():
    batch = process(row([5, EOS, 7, 8]))
    assert batch["seq_idx"] is None
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[5, EOS, 7, 8]]


def test_tokens_text_and_chat_in_one_batch():
    chat = [text_message("user", "a"), text_message("assistant", "b")]
    batch = process(
        row([5, EOS, 7], [0, 1, 1]),
        {"id": "t", "text": "hello"},
        {"id": "c", "messages": chat},
        row([1, 2, EOS, 4], None),
    )
    assert batch["ids"] == ["row", "t", "c", "row"]
    assert batch["seq_idx"].tolist() == [[0, 1, 1, 1, 1, 1], [0] * 6, [0] * 6, [0] * 6]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 2, 2], [*range(6)], [*range(6)], [0, 1, 2, 3, 3, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 6, 6, 4]
    assert batch["labels"][0].tolist() == [5, EOS, 7] + [IGNORE_INDEX] * 3
    assert batch["labels"][2].tolist()[-2:] == [ord("b"), EOS]
    two = select_rows(batch, [2, 0])
    assert two["seq_idx"].tolist() == [[0] * 6, [0, 1, 1, 1, 1, 1]]
    # Rows of one kind alone are what they are without the others.
    alone = process({"id": "t", "text": "hello"})
    for name in ("input_ids", "labels", "position_ids", "attention_mask"):
        assert batch[name][1].tolist() == alone[name][0].tolist()
    assert alone["seq_idx"] is None


def test_a_token_row_as_prompt():
    batch = process(row([EOS, 5], [0, 0]), row([EOS, 5, 6, 7]), mode="prompt", max_len=3)
    assert batch["input_ids"].tolist() == [[PAD, EOS, 5], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["seq_idx"] is None


def test_rows_that_do_not_fit():
    with pytest.raises(BadDataError, match="'row' has 5 tokens, more than max_len 4: set the data set's window"):
        process(row([1, 2, 3, 4, 5]), max_len=4)
    with pytest.raises(BadDataError, match="tokenised with mistral-1, and the model reads byte"):
        process(row([1, 2], key="mistral-1"))
    for mode in ("train", "prompt"):
        with pytest.raises(BadDataError, match="'row' is empty"):
            process(row([]), mode=mode)
    with pytest.raises(BadDataError, match=r"documents \(1,\) do not fit tokens \(2,\)"):
        row([1, 2], [0])
    with pytest.raises(BadDataError, match="exactly one of image, text, messages and tokens"):
        check_example({"id": "x", "text": "a", "tokens": np.array([1])})


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # far from uniform, so that a leak shows
    }
    return CausalLM(HFCausalLM("llama", config)).double().eval()


def loss_of(model, *examples):
    found = NextToken().loss(model, process(*examples), StepContext("s", 0))
    return float(found.loss_sum.detach()), int(found.num_terms)


def test_packed_documents_have_the_loss_of_the_documents_apart(llama):
    """eos d0 eos d1 eos d2: each document is scored from its opening token on, and its end by itself."""
    documents = [list(b"first one"), list(b"2nd"), list(b"the third, cut")]
    tokens = [t for d in documents for t in (EOS, *d)]
    numbers = [i for i, d in enumerate(documents) for _ in (EOS, *d)]
    packed, terms = loss_of(llama, row(tokens, numbers))
    apart = [loss_of(llama, row([EOS, *d, EOS])) for d in documents[:2]]
    apart.append(loss_of(llama, row([EOS, *documents[2]])))  # its end is not in the row
    assert terms == sum(n for _, n in apart) == len(tokens) - 1
    assert packed == pytest.approx(sum(value for value, _ in apart), rel=1e-9)
    # It matters: read as one text, the row has another loss.
    assert abs(loss_of(llama, row(tokens))[0] - packed) > 1


def test_padding_beside_a_packed_row_changes_nothing(llama):
    packed = row([EOS, 5, 6, EOS, 7], [0, 0, 0, 1, 1])
    text = {"id": "t", "text": "a longer row of text"}
    both = loss_of(llama, packed, text)
    one, other = loss_of(llama, packed), loss_of(llama, text)
    assert both == (pytest.approx(one[0] + other[0], rel=1e-9), one[1] + other[1])
